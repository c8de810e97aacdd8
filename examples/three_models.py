"""Three models in a loop, and an accelerator with room for one of them.

Some pipelines call several models in turn, the last one again and again. With `cpu_offload_with_hook` each model stays
in RAM until it is called. Calling it sends the one before it back to RAM first. Between calls of the same model nothing
is moved: that is what makes it the right tool for a loop, where moving single layers each time would be slow.
"""

from __future__ import annotations

import torch
from torch import nn

import hf_bigload

WIDTH, STEPS = 256, 50


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def main() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]

    # Each model is told whose place it takes. They run on the accelerator, unless `execution_device` names another
    # device; on a machine that has none they run on the CPU, and nothing has to move.
    encoder, encoder_hook = hf_bigload.cpu_offload_with_hook(models[0])
    refiner, refiner_hook = hf_bigload.cpu_offload_with_hook(models[1], prev_module_hook=encoder_hook)
    decoder, decoder_hook = hf_bigload.cpu_offload_with_hook(models[2], prev_module_hook=refiner_hook)

    with torch.no_grad():
        x = encoder(torch.ones(1, WIDTH))
        for _ in range(STEPS):  # the refiner comes to the device in the first step, and stays for the others
            x = refiner(x)
        print(f"after the loop: encoder on {device_of(encoder)}, refiner on {device_of(refiner)}")
        x = decoder(x)

    # Nobody comes after the last model, so it is sent back by hand.
    print(f"after the last model: refiner on {device_of(refiner)}, decoder on {device_of(decoder)}")
    decoder_hook.offload()
    print(f"after offload(): decoder on {device_of(decoder)}")
    print(f"result: {tuple(x.shape)} on {x.device}")


if __name__ == "__main__":
    main()
