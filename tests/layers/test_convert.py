"""Weight layouts: exact both ways, the same function, errors that name the tensor."""

import tracemalloc

import pytest
import torch
from cases import random_experts, relative_error, same, weighted_sum
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext import GroupedExperts, make_plan
from moe_ext.deepspeed.experts import Experts
from moe_ext.experts.convert import (
    DEEPSEEK,
    GPT_OSS,
    GROUPED,
    GROUPED_OAI,
    MIXTRAL,
    NEMOTRON,
    QWEN,
    PerExpert,
    Stacked,
    convert_state_dict,
    deepspeed,
    detect,
    from_grouped,
    to_grouped,
)

E, H, FFN = 3, 6, 5
PREFIX = "model.layers.0.mlp.experts."
SEQUENTIAL = deepspeed(PerExpert(up="0", down="2"))

LAYOUTS = {
    "mixtral": (MIXTRAL, True),
    "qwen": (QWEN, True),
    "deepspeed of mixtral": (deepspeed(MIXTRAL), True),
    "grouped": (GROUPED, True),
    "transposed": (Stacked(transposed=True), True),
    "interleaved": (Stacked(interleaved=True), True),
    "gpt-oss": (GPT_OSS, True),
    "nemotron": (NEMOTRON, False),
    "sequential": (SEQUENTIAL, False),
    "wi, wo": (deepspeed(PerExpert(up="wi", down="wo")), False),
    "grouped without gate": (GROUPED, False),
    "transposed without gate": (Stacked(transposed=True), False),
}
layouts = pytest.mark.parametrize(("layout", "gated"), LAYOUTS.values(), ids=LAYOUTS)


def grouped_experts(gated=True, bias=True, num_experts=E, **options) -> GroupedExperts:
    activation = "swiglu" if gated else "relu"
    return GroupedExperts(num_experts, H, FFN, activation, bias, **options)


def per_expert(layout: PerExpert, prefix: str = "") -> dict[str, Tensor]:
    return from_grouped(grouped_experts(layout.gate is not None).state_dict(), layout, prefix)


@pytest.mark.parametrize("num_experts", [1, E])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@layouts
def test_converting_there_and_back_is_the_identity(layout, gated, bias, dtype, num_experts):
    state = grouped_experts(gated, bias, num_experts, dtype=dtype).state_dict()
    there = from_grouped(state, layout, PREFIX)
    assert all(name.startswith(PREFIX + layout.parent) for name in there)
    assert all(tensor.is_contiguous() for tensor in there.values())
    teacher = {f"teacher.{name}": torch.zeros_like(tensor) for name, tensor in there.items()}
    back = to_grouped(there | teacher, layout, PREFIX)
    assert all(tensor.is_contiguous() for tensor in back.values())
    assert same(back, state)
    assert same(from_grouped(back, layout, PREFIX), there)


@layouts
def test_converted_tensors_stay_on_their_device(layout, gated):
    there = from_grouped(grouped_experts(gated, device="meta").state_dict(), layout)
    assert {tensor.device.type for tensor in there.values()} == {"meta"}
    assert {tensor.device.type for tensor in to_grouped(there, layout).values()} == {"meta"}


def test_converted_experts_own_their_memory():
    for tensor in per_expert(QWEN).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def expert_of(layout: PerExpert, bias: bool) -> nn.ModuleDict:
    """The layers of an expert, under the layout's names."""
    sizes = {layout.up: (H, FFN), layout.gate: (H, FFN), layout.down: (FFN, H)}
    layers = {name: nn.Linear(*size, bias) for name, size in sizes.items() if name is not None}
    return nn.ModuleDict(layers)


def output_of(expert: nn.ModuleDict, layout: PerExpert, x: Tensor) -> Tensor:
    up = expert[layout.up](x)
    active = F.relu(up) if layout.gate is None else F.silu(expert[layout.gate](x)) * up
    return expert[layout.down](active)


def agree(experts: GroupedExperts, outputs: list[Tensor], x: Tensor) -> bool:
    """Check that grouped experts compute `outputs`, each expert's output for all of x."""
    chosen, weights = random_experts(len(x), 2, E), torch.rand(len(x), 2, dtype=x.dtype)
    out = experts.routed(x, make_plan(chosen, E), weights)
    return relative_error(out, weighted_sum(outputs, chosen, weights)) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (MIXTRAL, PerExpert(gate="w1", up="w3", down="w2")),
        (QWEN, PerExpert(gate="gate_proj", up="up_proj", down="down_proj")),
        (NEMOTRON, PerExpert(up="up_proj", down="down_proj")),
        (deepspeed(QWEN), PerExpert(gate="gate_proj", up="up_proj", down="down_proj")),
        (SEQUENTIAL, PerExpert(up="0", down="2")),
    ],
)
def test_per_expert_weights_compute_the_same_function(layout, names, bias):
    """names: of the layers in checkpoints, by hand"""
    if layout.parent:
        theirs = Experts(expert_of(names, bias), E).double()
        modules = theirs.deepspeed_experts
    else:
        theirs = modules = nn.ModuleList(expert_of(names, bias) for _ in range(E)).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    experts = grouped_experts(names.gate is not None, bias, dtype=torch.float64)
    experts.load_state_dict(to_grouped(theirs.state_dict(), layout))
    x = torch.randn(40, H, dtype=torch.float64)
    assert agree(experts, [output_of(module, names, x) for module in modules], x)


def test_gpt_oss_weights_compute_the_same_function():
    sizes = {
        "gate_up_proj": (E, H, 2 * FFN),
        "gate_up_proj_bias": (E, 2 * FFN),
        "down_proj": (E, FFN, H),
        "down_proj_bias": (E, H),
    }
    state = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    experts = grouped_experts(dtype=torch.float64)
    experts.load_state_dict(to_grouped(state, GPT_OSS))
    x = torch.randn(40, H, dtype=torch.float64)
    outputs = []
    for e in range(E):
        pre_activation = x @ state["gate_up_proj"][e] + state["gate_up_proj_bias"][e]
        pre_activation = F.silu(pre_activation[:, ::2]) * pre_activation[:, 1::2]
        outputs.append(pre_activation @ state["down_proj"][e] + state["down_proj_bias"][e])
    assert agree(experts, outputs, x)


def test_gates_and_ups_of_gpt_oss_alternate_in_its_experts():
    """Its own loading and the converted weights are the same, and convert back."""
    shipped = from_grouped(grouped_experts(True).state_dict(), GPT_OSS)
    experts = GroupedExperts(E, H, FFN, activation="swiglu_oai", bias=True)
    experts.load_state_dict(shipped)
    own = experts.state_dict()
    converted = from_grouped(to_grouped(shipped, GPT_OSS), GROUPED_OAI)
    assert same(own, converted)
    assert same(from_grouped(to_grouped(own, GROUPED_OAI), GPT_OSS), shipped)


@pytest.mark.parametrize(
    "layout",
    [MIXTRAL, QWEN, NEMOTRON, *map(deepspeed, (MIXTRAL, QWEN, NEMOTRON)), GROUPED, GPT_OSS],
)
def test_known_layouts_are_detected(layout):
    gated = getattr(layout, "gate", "") is not None
    state = from_grouped(grouped_experts(gated).state_dict(), layout, PREFIX)
    assert detect(state, PREFIX) == layout
    assert detect(state) is None
    assert detect(state, "model.layers.1.mlp.experts.") is None


def test_unknown_layouts_are_not_detected():
    state = grouped_experts(bias=False).state_dict()
    assert detect(state) == GROUPED
    assert detect(grouped_experts(gated=False).state_dict()) == GROUPED
    assert detect(from_grouped(state, Stacked(transposed=True))) is None
    assert detect({"gate_up_proj": state["gate_up_proj"]}) is None
    assert detect(per_expert(SEQUENTIAL)) is None
    assert DEEPSEEK is QWEN


EXPERT = [f"1.{x}_proj.{y}" for x in ("gate", "up", "down") for y in ("weight", "bias")]
ones = torch.ones
# Changes to a state, and what to_grouped says.
MISFITS_OF_QWEN = [
    (dict.fromkeys(EXPERT), r"missing: \S*experts\.1\.down_proj\.bias, .* and 2 more"),
    ({"2.up_proj.weight": None}, r"missing: \S*\.mlp\.experts\.2\.up_proj\.weight$"),
    ({"0.down_proj.bias": None}, r"missing: \S*\.mlp\.experts\.0\.down_proj\.bias$"),
    ({"1.up_proj.weight_scale": ones(())}, r"not of the layout: \S*\.1\.up_proj\.weight_scale$"),
    (
        {"1.up_proj.weight": ones(FFN + 1, H)},
        r"experts\.1\.up_proj\.weight must be \[5, 6\] float32 on cpu like "
        r"\S*experts\.0\.gate_proj\.weight, got \[6, 6\] float32 on cpu",
    ),
    (
        {"2.down_proj.bias": ones(H, dtype=torch.float16)},
        r"2\.down_proj\.bias must be \[6\] float32 on cpu .*, got \[6\] float16 on cpu",
    ),
    (
        {"2.down_proj.bias": ones(H, device="meta")},
        r"2\.down_proj\.bias must be \[6\] float32 on cpu .*, got \[6\] float32 on meta",
    ),
    ({"0.gate_proj.weight": ones(H)}, r"0\.gate_proj\.weight must have 2 dimensions, got \[6\]"),
    (
        {f"{e}.down_proj.weight": ones(FFN, H) for e in range(E)},
        r"experts\.down_proj must be \[3, 6, 5\] beside .*, got \[3, 5, 6\]",
    ),
]
MISFITS_OF_GPT_OSS = [
    ({"gate_up_proj": ones(E, H, 7)}, r"must be of even .*, got \[3, 6, 7\]"),
    ({"gate_up_proj": ones(E, H)}, r"gate_up_proj must have 3 dimensions, got \[3, 6\]"),
    ({"down_proj": ones(E, H, FFN)}, r"down_proj must be .*, got \[3, 5, 6\]"),
    ({"gate_up_proj_bias": ones(E, 9)}, r"_bias must be of even .*, got \[3, 9\]"),
    ({"gate_up_proj_bias": ones(E, 8)}, r"_bias must be \[3, 10\] .*, got \[3, 8\]"),
    ({"down_proj_bias": ones(E, 1)}, r"_bias must be \[3, 6\] .*, got \[3, 1\]"),
    ({"down_proj_bias": None}, r"missing: \S*experts\.down_proj_bias$"),
    ({"gate_up_proj_blocks": ones(E, 2)}, r"not of the layout: \S*gate_up_proj_blocks$"),
]


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        *((QWEN, *misfit) for misfit in MISFITS_OF_QWEN),
        *((GPT_OSS, *misfit) for misfit in MISFITS_OF_GPT_OSS),
    ],
)
def test_tensors_that_do_not_fit_are_named(layout, changes, message):
    state = from_grouped(grouped_experts().state_dict(), layout, PREFIX)
    state |= {PREFIX + name: tensor for name, tensor in changes.items()}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"convert: .*{message}"):
        to_grouped(state, layout, PREFIX)


@pytest.mark.parametrize("number", ["10000000", str(10**30), "9" * 5000, "007", "00"])
def test_a_gap_in_the_experts_numbers_is_an_error(number):
    """A large expert number must not make the error list millions of names."""
    names = [f"{PREFIX}{e}.{layer}_proj.weight" for e in (0, number) for layer in ("up", "down")]
    state = dict.fromkeys(names, torch.zeros(2, 2))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"convert: experts must be numbered .*\.{number}\.down"):
        to_grouped(state, NEMOTRON, PREFIX)
    with pytest.raises(ValueError, match="convert: experts must be numbered"):
        convert_state_dict(state, NEMOTRON, GROUPED)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_states_and_layouts_that_do_not_fit_are_errors():
    gated, plain = (grouped_experts(gated).state_dict() for gated in (True, False))
    layer_1, up_alone = PREFIX.replace("0", "1"), {"gate_up_proj": torch.zeros(E, 2 * FFN, H)}
    model, taken = per_expert(MIXTRAL, PREFIX), {f"{PREFIX}down_proj": torch.zeros(1)}
    for function, args, message in (
        (
            *(to_grouped, (from_grouped(gated, GPT_OSS), GROUPED)),
            r"down_proj must be \[3, 10, 3\] beside gate_up_proj \[3, 6, 10\]",
        ),
        (
            *(to_grouped, (per_expert(QWEN, PREFIX), QWEN, layer_1)),
            r"no experts of PerExpert\(.*parent='model\.layers\.1\.mlp\.experts\.'\)",
        ),
        (from_grouped, (gated, NEMOTRON), r"PerExpert\(.*\) has no place for gate_up_proj"),
        (from_grouped, (plain, MIXTRAL), r"PerExpert\(.*\) has no place for up_proj"),
        (from_grouped, (up_alone, MIXTRAL), "missing: down_proj"),
        (convert_state_dict, (model, GROUPED, MIXTRAL), r"no experts of Stacked\("),
        (convert_state_dict, (model, QWEN, GROUPED), r"not of the layout: \S*\.0\.w1\.bias"),
        (
            *(convert_state_dict, (model | taken, MIXTRAL, GROUPED)),
            r"has \['model\.\S*experts\.down_proj'\] already",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            function(*args)


PLACES = ("model.layers.0.mlp.experts.", "model.layers.11.mlp.experts.", "experts.")
OTHERS = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.shared_experts.0.w1.weight",
    "model.layers.0.mlp.experts.e_score_correction_bias",
    "0.weight",
    "0.w1.weight",
    "up_proj",
)


@layouts
def test_a_models_experts_convert_there_and_back(layout, gated):
    others = {name: torch.randn(2) for name in OTHERS}
    modules = {place: grouped_experts(gated).state_dict() for place in PLACES}
    ours = {place + name: x for place, state in modules.items() for name, x in state.items()}
    theirs = convert_state_dict(others | ours, GROUPED, layout)
    expected = dict(others)
    for place, state in modules.items():
        expected |= from_grouped(state, layout, place)
    assert same(theirs, expected)
    back = convert_state_dict(theirs, layout, GROUPED)
    assert same(back, others | ours)
    assert all(theirs[name] is back[name] is others[name] for name in OTHERS)


# Each model reads those that it has.
OPTIONS = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
MODELS = {"Mixtral": MIXTRAL, "Qwen3Moe": QWEN, "DeepseekV3": DEEPSEEK, "GptOss": GPT_OSS}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_transformers_load(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra peers")
    from safetensors.torch import load_file

    layout, config = MODELS[name], getattr(transformers, f"{name}Config")(**OPTIONS)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for tensor in model.parameters():
        nn.init.normal_(tensor)
    model.save_pretrained(tmp_path)
    disk = {}
    for file in tmp_path.glob("*.safetensors"):
        disk |= load_file(file)

    # gpt-oss keeps its own layout in memory; the others have GroupedExperts'.
    memory = model.state_dict()
    own = GPT_OSS if name == "GptOss" else GROUPED
    places = {key.rpartition("down_proj")[0] for key in memory if key.endswith("experts.down_proj")}
    assert len(places) == (1 if name == "DeepseekV3" else 2)
    for place in places:
        saved = place.replace("mlp", "block_sparse_moe") if name == "Mixtral" else place
        assert detect(disk, saved) == layout
        grouped = to_grouped(disk, layout, saved)
        in_memory = {key.removeprefix(place): x for key, x in memory.items() if place in key}
        assert same(from_grouped(grouped, own), in_memory)
    whole = convert_state_dict(disk, layout, own)
    whole = {key.replace("block_sparse_moe", "mlp"): tensor for key, tensor in whole.items()}
    assert same(whole, memory)
    grouped = convert_state_dict(disk, layout, GROUPED)
    assert same(convert_state_dict(grouped, GROUPED, layout), disk)
