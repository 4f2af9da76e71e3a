"""How the embedded model is made: folders of pictures from packages, and a file of settings for each training."""
