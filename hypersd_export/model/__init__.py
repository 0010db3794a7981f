"""Base pipelines and LoRAs: find, check, load one component at a time, fuse with proof. See `base` and `lora`."""
