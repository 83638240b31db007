const meshes = document.getElementById("meshes");
if (meshes) {
  const { choices, shown, tables } = JSON.parse(meshes.textContent);
  const form = document.querySelector("form.mesh");
  const body = document.querySelector(".meshes tbody");
  const draw = () => {
    for (const input of form.elements) {
      const text = shown[input.name]?.[input.value];
      if (text === undefined) continue;
      input.previousElementSibling.value = text;
      input.setAttribute("aria-valuetext", text);
    }
    const chosen = ["models", "lengths", "ranks", "gpus"].map(
      name => choices[name][form.elements[name].value]);
    body.innerHTML = tables[chosen.join("/")];
  };
  form.hidden = false;
  form.addEventListener("input", draw);
  draw();
}
