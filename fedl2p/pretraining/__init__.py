"""What clients do to make theta_g, the pretrained global model; one file a method; `federation` carries messages."""
