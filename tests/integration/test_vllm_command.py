"""vLLM's own parser accepts every server command; its settings take the values we mean."""

from pathlib import Path

import pytest

from megatron_sip.config import StartServer
from megatron_sip.config_rules import CPU_HEAD_SIZES
from megatron_sip.serving.server import server_command


@pytest.fixture(scope="module")
def parser():
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


CASES = [
    ("cpu", "policy", "shared_memory", ()),
    ("cpu", "text", None, ()),
    ("cuda", "policy", "nccl", (0, 1)),
    ("cuda", "text", None, (2,)),
]


@pytest.mark.parametrize(("platform_kind", "role", "backend", "gpus"), CASES)
def test_vllm_parses_the_command_of(parser, platform_kind, role, backend, gpus):
    settings = StartServer(kind="start", model="policy", max_model_len=256, gpus=gpus)
    argv, _ = server_command(
        settings,
        name="s",
        model_dir=Path("/models/m"),
        port=1234,
        platform_kind=platform_kind,
        role=role,
        weight_transfer=backend,
    )
    args = parser.parse_args(argv[3:])
    assert (args.host, args.port, args.model) == ("127.0.0.1", 1234, "/models/m")
    assert args.served_model_name == ["s"] and args.max_model_len == 256
    assert args.middleware == ["megatron_sip.serving.control_auth.ControlAuth"]
    assert bool(args.enable_scale_out) == bool(args.skip_tokenizer_init) == (role == "policy")
    assert args.tensor_parallel_size == max(1, len(gpus)) and not args.api_key
    assert args.enforce_eager == (platform_kind == "cpu")


def test_head_sizes_of_the_recipe_are_those_of_vllms_cpu_attention():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
