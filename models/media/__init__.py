"""Reading and writing of videos and pictures, and a fixed transform between pixels and latents."""
