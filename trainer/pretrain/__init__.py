"""How the built-in model is made: drawings, captions, tokenizer, VAE, CLIP and UNet."""
