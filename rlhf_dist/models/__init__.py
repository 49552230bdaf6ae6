from rlhf_dist.models.quiet import quiet_bitsandbytes

quiet_bitsandbytes()  # before anything here imports peft, which imports it
