for (const cell of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(cell.querySelector("pre").innerText);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  cell.append(button);
}
// On a narrow screen the contents would push the text off it.
const contents = document.querySelector(".contents");
if (contents && matchMedia("(max-width: 60rem)").matches) contents.open = false;
