"""Files, timing, pretrained names: nothing about depth."""
