"""Experts of a layer spread over processes, by DeepSpeed's AutoEP (deepspeed/module_inject/auto_ep_layer.py)."""
