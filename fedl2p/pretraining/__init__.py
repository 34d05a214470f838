"""Ways to make theta_g, the pretrained global model, with clients of the `pretrain` pool; one file a method."""
