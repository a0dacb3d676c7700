"""Generation of text: the sampling of tokens and the loop that draws them."""
