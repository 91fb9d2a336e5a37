"""What our engine relies on in DeepSpeed's private parts."""

from __future__ import annotations


def test_deepspeed_still_has_the_switch_that_spares_a_cpu_the_compiler():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
