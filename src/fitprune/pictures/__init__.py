"""What a recipe does to a picture, to be looked at: which visual tokens stay, drawn, animated and as a page."""
