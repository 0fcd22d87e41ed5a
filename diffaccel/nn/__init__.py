"""Networks; none of them knows anything of diffusion."""
