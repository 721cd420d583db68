"""How large a pass may be; the families' tests compare what passes compute."""

import torch

from backends.encode import pass_tokens


def test_passes_are_smaller_on_a_cpu_and_the_wider_the_model_is():
    cpu = torch.device("cpu")
    assert pass_tokens(16384, cpu, torch.float32, 384) == 2048
    assert pass_tokens(16384, cpu, torch.bfloat16, 384) == 4096
    assert pass_tokens(16384, cpu, torch.float32, 4096) == 1024, "not so few that a pass costs more"
    assert pass_tokens(512, cpu, torch.float32, 384) == 512
    assert pass_tokens(16384, torch.device("cuda"), torch.float32, 384) == 16384
