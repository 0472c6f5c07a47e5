import copy

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

from p2d_peft.tuners import HeadSparseConfig
from p2d_peft.tuners.head_sparse import Linear, WeightSlice


IN, OUT = 12, 10
SLICES = {
    "rows": WeightSlice(0, (2, 3, 4)),
    "scattered rows": WeightSlice(0, (0, 3, 4, 9)),
    "columns": WeightSlice(1, (6, 7, 8)),
    "scattered columns": WeightSlice(1, (1, 5, 11)),
}


def bits(tensor):
    """A tensor's bits, in which 0.0 and -0.0 differ and NaN equals itself."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def make_layer(weight_slice, dtype=torch.float32, base=None, init_weights=False, delta_dtype=None, r=None):
    base = nn.Linear(IN, OUT).to(dtype) if base is None else base
    layer = Linear(base, "default", weight_slice, HeadSparseConfig(init_weights=init_weights, r=r))
    return layer if delta_dtype is None else with_deltas_of(layer, delta_dtype)


def with_deltas_of(layer, dtype):
    """What PEFT's autocast_adapter_dtype does."""
    for name, delta in list(layer.head_sparse_delta.items()):
        layer.head_sparse_delta[name].weight = nn.Parameter(torch.randn_like(delta.weight, dtype=dtype))
    return layer


def dense_delta(layer, name="default"):
    """The delta as a dense matrix, put together one row or column at a time."""
    dense = torch.zeros(OUT, IN)
    weight_slice = layer.head_sparse_slice[name]
    for position, index in enumerate(weight_slice.indices):
        if weight_slice.dim == 0:
            dense[index] = layer.head_sparse_delta[name].weight[position].detach()
        else:
            dense[:, index] = layer.head_sparse_delta[name].weight[:, position].detach()
    return dense


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN), (2, 0, IN)])
def test_forward_adds_the_delta(kind, shape):
    layer = make_layer(SLICES[kind])
    x = torch.randn(shape)
    dense = dense_delta(layer)
    assert dense.count_nonzero() == layer.head_sparse_delta["default"].weight.numel()
    expected = nn.functional.linear(x, layer.base_layer.weight + dense, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.get_delta_weight("default"), dense)


@pytest.mark.parametrize("kind", SLICES)
def test_gradients(kind):
    layer = make_layer(SLICES[kind])
    x, by_hand = torch.randn(5, IN, requires_grad=True), torch.randn(5, IN)
    by_hand = x.detach().clone().requires_grad_()
    weight = (layer.base_layer.weight + dense_delta(layer)).detach().requires_grad_()
    (layer(x) ** 2).sum().backward()
    (nn.functional.linear(by_hand, weight, layer.base_layer.bias) ** 2).sum().backward()
    weight_slice = SLICES[kind]
    torch.testing.assert_close(x.grad, by_hand.grad)
    torch.testing.assert_close(
        layer.head_sparse_delta["default"].weight.grad,
        weight.grad.index_select(weight_slice.dim, layer.head_sparse_index["default"]),
    )


class NegativeZeros(nn.Linear):
    """Its output has zeros of both signs, as fp16 gives by underflow."""

    def forward(self, x):
        result = super().forward(x)
        result[..., ::2] = -0.0
        result[..., ::4] = 0.0
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SLICES)
def test_zero_delta_keeps_every_bit(kind, dtype):
    layer = make_layer(SLICES[kind], base=NegativeZeros(IN, OUT).to(dtype), init_weights=True)
    layer.head_sparse_delta["default"].weight = nn.Parameter(layer.head_sparse_delta["default"].weight.float())
    x = torch.randn(7, IN, dtype=dtype)
    expected = layer.base_layer(x)
    assert (bits(expected) != bits(expected + 0.0)).any()  # there are negative zeros to lose
    assert torch.equal(bits(layer(x)), bits(expected))


def test_base_layers_own_forward_and_hooks_are_used():
    layer = make_layer(SLICES["rows"])
    x = torch.randn(3, IN)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    before = layer(x).detach()
    assert torch.equal(*seen[0])  # what the hook got was not changed behind its back
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(layer(x), before + 1)
    layer.base_layer.register_full_backward_hook(lambda *args: None)  # forbids changes in place
    layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("kind", ["scattered rows", "scattered columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_delta_on_a_half_base(kind, dtype):
    layer = make_layer(SLICES[kind], dtype=dtype, delta_dtype=torch.float32)
    x = torch.randn(5, IN, dtype=dtype)
    result = layer(x)
    assert result.dtype == dtype
    weight = layer.base_layer.weight.float() + dense_delta(layer)
    expected = nn.functional.linear(x.float(), weight, layer.base_layer.bias.float())
    torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.02)
    (result.float() ** 2).sum().backward()
    assert layer.head_sparse_delta["default"].weight.grad.dtype == torch.float32


def test_new_adapter_is_active_and_trainable_unless_for_inference():
    for inference_mode in (False, True):
        config = HeadSparseConfig(init_weights=False, inference_mode=inference_mode)
        layer = Linear(nn.Linear(IN, OUT), "named", SLICES["rows"], config)
        assert layer.active_adapters == ["named"]
        assert layer.head_sparse_delta["named"].weight.requires_grad is not inference_mode


@pytest.mark.parametrize("where", SLICES)
def test_the_product_is_in_the_inputs_dtype_and_the_gradient_in_the_deltas(where):
    """A product in float32 takes a GPU many times as long, and keeps the input a second time for the backward pass."""
    layer = make_layer(SLICES[where], dtype=torch.bfloat16, delta_dtype=torch.float32)
    x, kept = torch.randn(5, IN, dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in kept if t.is_floating_point())
    y.sum().backward()
    delta = layer.head_sparse_delta["default"].weight
    assert delta.dtype == delta.grad.dtype == torch.float32
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    torch.testing.assert_close(y.float(), x.float() @ exact.T + layer.base_layer.bias.float(), atol=0.05, rtol=0.05)
    with disable_input_dtype_casting(layer):
        assert torch.equal(layer(x), y)


def test_autocast():
    layer = make_layer(SLICES["rows"])
    x = torch.randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        result, base = layer(x), layer.base_layer(x)
    assert result.dtype == base.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), layer(x), atol=0.05, rtol=0.05)


def add_adapters(layer):
    """Two more adapters, which overlap the first one (rows 0, 3, 4, 9) and each other."""
    for name, indices in (("b", (3, 4, 5)), ("c", (0, 4))):
        layer.update_layer(name, WeightSlice(0, indices), HeadSparseConfig(init_weights=False))
    layer.set_adapter(["default", "b", "c"])
    return layer


def test_active_adapters_add_up():
    layer = add_adapters(make_layer(SLICES["scattered rows"]))
    x = torch.randn(5, IN)
    for names in ([], ["b"], ["c", "default"], ["default", "b", "c"], ["b", "of another layer"]):
        layer.set_adapter(names)
        dense = sum(dense_delta(layer, name) for name in names if name in layer.head_sparse_delta)
        expected = nn.functional.linear(x, layer.base_layer.weight + dense, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected)
        assert {n for n, delta in layer.head_sparse_delta.items() if delta.weight.requires_grad} == set(names) & {
            "default",
            "b",
            "c",
        }
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype):
    layer = with_deltas_of(add_adapters(make_layer(SLICES["scattered rows"], dtype=dtype)), torch.float32)
    before = layer.base_layer.weight.detach().clone()
    x = torch.randn(5, IN, dtype=dtype)
    unmerged = layer(x)

    layer.merge(adapter_names=["b"])
    # added in fp32 and rounded once
    assert torch.equal(layer.base_layer.weight, (before.float() + dense_delta(layer, "b")).to(dtype))
    with pytest.warns(UserWarning, match="additionally merging default,c"):
        layer.merge()
    assert layer.merged_adapters == ["b", "default", "c"]
    assert (layer.base_layer.weight != before).any(1).tolist() == [row in (0, 3, 4, 5, 9) for row in range(OUT)]
    torch.testing.assert_close(layer(x), unmerged, **({} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}))

    layer.unmerge()
    assert not layer.merged
    assert torch.equal(bits(layer.base_layer.weight), bits(before))
    assert torch.equal(layer(x), unmerged)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_disabling_a_merged_layer_unmerges_it():
    layer = make_layer(SLICES["columns"])
    x = torch.randn(5, IN)
    base = layer.base_layer(x)
    layer.merge()
    assert not torch.equal(layer(x), base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base) and not layer.merged


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_finds_it_before_the_base_is_touched(broken):
    layer = add_adapters(make_layer(SLICES["scattered rows"]))
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.head_sparse_delta["c"].weight[1, 2] = broken  # the last one: the others would be merged by then
    with pytest.raises(ValueError, match=r"NaNs detected .* The adapter c seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    layer.merge(safe_merge=True, adapter_names=["default", "b"])
    assert layer.merged_adapters == ["default", "b"]


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_a_quantized_weight_is_refused(safe_merge):
    base = nn.Linear(IN, OUT)
    base.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)
    layer = make_layer(SLICES["rows"], base=base)
    assert layer.head_sparse_delta["default"].weight.dtype == torch.float32
    with pytest.raises(TypeError, match=r"Merging into a Linear with weights of torch\.int8 is not supported"):
        layer.merge(safe_merge=safe_merge)
    assert not layer.merged


def fp8_linear():
    base = nn.Linear(IN, OUT)
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return base


def test_merging_into_an_fp8_weight_is_refused():
    """It counts as floating point, and has no arithmetic."""
    layer = make_layer(SLICES["rows"], base=fp8_linear())
    with pytest.raises(
        TypeError, match=r"Merging into a Linear with weights of torch\.float8_e4m3fn is not supported"
    ):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("r", [None, 2])
def test_deltas_of_an_fp8_weight(r):
    layer = make_layer(SLICES["rows"], base=fp8_linear(), r=r)
    assert {delta.weight.dtype for delta in layer.deltas_of("default")} == {torch.float32}
    assert layer.get_delta_weight("default").count_nonzero() == 3 * IN


def test_unsupported_base_layer():
    with (
        pytest.warns(UserWarning, match="Unsupported layer type"),
        pytest.raises(TypeError, match="layer type LayerNorm"),
    ):
        make_layer(SLICES["rows"], base=nn.LayerNorm(IN))


def test_only_the_delta_is_in_the_state_dict():
    layer = make_layer(SLICES["rows"])
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "head_sparse_delta.default.weight"}
    assert layer.head_sparse_delta["default"].weight.shape == (3, IN)
    assert make_layer(SLICES["columns"]).head_sparse_delta["default"].weight.shape == (OUT, 3)


def test_delete_adapter_leaves_nothing_of_it():
    layer = add_adapters(make_layer(SLICES["scattered rows"]))
    layer.delete_adapter("b")
    for kept in (layer.head_sparse_delta, layer.head_sparse_slice, layer.head_sparse_index):
        assert set(kept) == {"default", "c"}
    assert layer.active_adapters == ["default", "c"]


@pytest.mark.parametrize("kind", SLICES)
def test_wraps_the_layer_of_another_adapter(kind):
    x = torch.randn(5, IN)
    inner = make_layer(SLICES["scattered rows"])
    outer = make_layer(SLICES[kind], base=inner)
    assert outer.get_base_layer() is inner.base_layer
    expected = nn.functional.linear(
        x, inner.base_layer.weight + dense_delta(inner) + dense_delta(outer), inner.base_layer.bias
    )
    torch.testing.assert_close(outer(x), expected)


def test_indices_survive_the_meta_device():
    layer = make_layer(SLICES["scattered rows"])
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, IN)
    expected = layer(x)
    layer.to("meta")
    assert layer(x.to("meta")).shape == (5, OUT)
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


class OnAnotherDevice(torch.Tensor):
    """A tensor that stands for one on another device: it has to be copied to where the inputs are."""

    device = torch.device("meta")

    def to(self, device):
        return self.as_subclass(torch.Tensor).clone()


@pytest.mark.parametrize("kind", SLICES)
def test_trains_after_a_first_pass_in_inference_mode(kind):
    layer = make_layer(SLICES[kind])
    index = layer.head_sparse_index["default"]
    layer.head_sparse_index["default"] = index.as_subclass(OnAnotherDevice)
    x = torch.randn(5, IN)
    with torch.inference_mode():
        expected = layer(x).clone()
    moved = layer.head_sparse_index["default"]
    assert type(moved) is torch.Tensor and torch.equal(moved, index)
    result = layer(x.requires_grad_())
    result.sum().backward()
    assert torch.equal(result, expected) and layer.head_sparse_delta["default"].weight.grad.count_nonzero()


def test_the_index_is_made_where_the_delta_is(monkeypatch):
    """On the base weight's device, so that a first pass that is captured in a CUDA graph has nothing to copy."""
    layer, elsewhere, asked = make_layer(SLICES["rows"]), torch.device("cuda", 1), []
    monkeypatch.setattr(layer, "_get_base_layer_device_and_dtype", lambda base_layer: (elsewhere, None))
    for name in ("tensor", "zeros"):
        monkeypatch.setattr(torch, name, lambda *args, device, **kwargs: asked.append(device) or torch.ones(3, IN))
    layer.update_layer("other", SLICES["rows"], HeadSparseConfig())
    assert asked == [elsewhere, elsewhere]


@pytest.mark.parametrize("kind", SLICES)
def test_low_rank_delta(kind):
    """It is the full delta `B @ A` in the same slice: the same output, gradients, merged weight."""
    weight_slice = SLICES[kind]
    low, full = make_layer(weight_slice, r=2), make_layer(weight_slice)
    full.base_layer.load_state_dict(low.base_layer.state_dict())
    A, B = low.head_sparse_A["default"].weight, low.head_sparse_B["default"].weight
    rows, columns = weight_slice.shape(IN, OUT)
    assert A.shape == (2, columns) and B.shape == (rows, 2) and "default" not in low.head_sparse_delta
    with torch.no_grad():
        full.head_sparse_delta["default"].weight.copy_(B @ A)
    x = torch.randn(5, IN)
    torch.testing.assert_close(low(x), full(x))
    assert torch.equal(low.get_delta_weight("default"), dense_delta(full))

    (low(x) ** 2).sum().backward()
    (full(x) ** 2).sum().backward()
    gradient = full.head_sparse_delta["default"].weight.grad
    torch.testing.assert_close(A.grad, B.T @ gradient)
    torch.testing.assert_close(B.grad, gradient @ A.T)

    before = low.base_layer.weight.detach().clone()
    low.merge(safe_merge=True)
    full.merge()
    assert torch.equal(low.base_layer.weight, full.base_layer.weight)
    low.unmerge()
    assert torch.equal(bits(low.base_layer.weight), bits(before))


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_delta_starts_at_zero(kind, dtype):
    layer = make_layer(SLICES[kind], base=NegativeZeros(IN, OUT).to(dtype), init_weights=True, r=2)
    assert (
        not layer.head_sparse_B["default"].weight.any() and layer.head_sparse_A["default"].weight.count_nonzero() > 1
    )
    x = torch.randn(7, IN, dtype=dtype)
    assert torch.equal(bits(layer(x)), bits(layer.base_layer(x)))
    layer(x).sum().backward()
    assert layer.head_sparse_B["default"].weight.grad.count_nonzero()


def conv1d_of(linear):
    base = Conv1D(OUT, IN)
    with torch.no_grad():
        base.weight.copy_(linear.weight.T)
        base.bias.copy_(linear.bias)
    return base


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("kind", SLICES)
def test_conv1d_is_the_linear_layer_with_its_weight_transposed(kind, r):
    linear = make_layer(SLICES[kind], r=r)
    conv = make_layer(SLICES[kind], base=conv1d_of(linear.base_layer), r=r)
    assert (conv.in_features, conv.out_features) == (IN, OUT)
    deltas = {name: p for name, p in linear.state_dict().items() if "head_sparse" in name}
    conv.load_state_dict(deltas, strict=False)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(conv(x), linear(x))
    delta = conv.get_delta_weight("default")
    assert delta.shape == conv.base_layer.weight.shape and torch.equal(delta.T, linear.get_delta_weight("default"))
    before, storage = conv.base_layer.weight.detach().clone(), conv.base_layer.weight.data_ptr()
    conv.merge(safe_merge=True)
    linear.merge()
    assert torch.equal(conv.base_layer.weight.T, linear.base_layer.weight)
    assert conv.base_layer.weight.data_ptr() == storage  # changed in place
    conv.unmerge()
    assert torch.equal(bits(conv.base_layer.weight), bits(before))


def test_the_base_weight_is_never_copied_in_a_step():
    """No tensor of its size is kept for the backward pass but the weight itself."""
    layer = make_layer(SLICES["rows"])
    layer.base_layer.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, IN, requires_grad=True)).sum().backward()
    assert all(tensor.numel() < OUT * IN or tensor.data_ptr() == layer.base_layer.weight.data_ptr() for tensor in kept)
    assert layer.base_layer.weight.grad is None
