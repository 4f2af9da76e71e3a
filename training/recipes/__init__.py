"""How the embedded model of 128 px is made: pictures from packages, and a file of settings for each training."""
