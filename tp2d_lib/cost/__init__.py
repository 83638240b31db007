"""What a rank will hold and send: predicted by a dry run, measured, by formula."""
