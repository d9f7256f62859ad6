"""The second device itself: it refuses what a GPU refuses, and computes what the CPU computes."""

import copy

import pytest
import torch
from torch.nn import functional

DEVICE = "second"


def test_a_device_of_its_own_is_the_accelerator():
    assert torch.accelerator.current_accelerator().type == DEVICE
    assert torch.get_device_module(torch.device(DEVICE)) is torch.second
    assert torch.zeros(3, device=DEVICE).device.type == "second"
    assert repr(torch.ones(2).to(DEVICE)) == "tensor([1., 1.], device='second:0')"


MIXED = {
    "x + y": lambda x, y: x + y,
    "x @ y": lambda x, y: x @ y,
    "x += y": lambda x, y: x.add_(y),
    "cat": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([y, x]),
    "linear": lambda x, y: functional.linear(x, y),
    "conv1d": lambda x, y: functional.conv1d(x, y[..., None]),
    "layer_norm": lambda x, y: functional.layer_norm(x, (4,), weight=y[0]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "gather": lambda x, y: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "index_select": lambda x, y: x.index_select(0, torch.zeros(1, dtype=torch.long)),
    "embedding": lambda x, y: functional.embedding(torch.zeros(1, dtype=torch.long), x),
    "index_put": lambda x, y: x.index_put_((torch.arange(4, device=x.device),), y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0),
    "equal": lambda x, y: torch.equal(x, y),
    "scaled_dot_product_attention": lambda x, y: functional.scaled_dot_product_attention(x, y, y),
    "cross_entropy": lambda x, y: functional.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
}


@pytest.mark.parametrize("work", MIXED)
def test_tensors_of_two_devices_are_refused(work):
    here, there = torch.randn(4, 4), torch.randn(4, 4).to(DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[work](there, here)


def test_numbers_indices_and_copies_may_cross():
    here = torch.arange(12.0).view(3, 4)
    there = here.to(DEVICE)
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), here[[2, 0]])
    assert torch.equal(there[here > 3].cpu(), here[here > 3])
    assert torch.equal(torch.zeros(3, 4).copy_(there), here)
    assert torch.equal(torch.zeros(3, 4, device=DEVICE).copy_(here).cpu(), here)
    assert there.to(DEVICE) is there


VIEWS = {
    "transpose": lambda x: x.T,
    "slice": lambda x: x[1:, ::2],
    "view": lambda x: x.view(2, 2, 4),
    "expand": lambda x: x[:1].expand(4, 4),
    "movedim": lambda x: x.movedim(0, -1),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(0, 2, 2),
    "chunk": lambda x: x.chunk(2)[1],
    "detach": lambda x: x.detach(),
    "flatten": lambda x: x.flatten(),
    "bytes": lambda x: x.view(torch.uint8),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_share_their_memory(view):
    here = torch.arange(16.0).view(4, 4)
    there = here.clone().to(DEVICE)
    part = VIEWS[view](there)
    assert part.untyped_storage().data_ptr() == there.untyped_storage().data_ptr()
    assert torch.equal(part.cpu(), VIEWS[view](here))
    if view != "expand":  # whose elements lie in one place
        part[..., 0] = 7
        VIEWS[view](here)[..., 0] = 7
    assert torch.equal(there.cpu(), here)


def test_gradients_are_those_of_the_cpu():
    def loss(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv1d(2, 3, 3, padding=1, bias=False),
            torch.nn.Conv1d(3, 2, 1),
            torch.nn.Flatten(),
            torch.nn.Linear(6, 8),
            torch.nn.GELU(),
            torch.nn.LayerNorm(8),
            torch.nn.Linear(8, 3),
        )
        net.to(device)
        x = torch.randn(5, 2, 3).to(device).requires_grad_()
        functional.cross_entropy(net(x), torch.arange(5).to(device) % 3).backward()
        optimiser = torch.optim.Adam(net.parameters(), fused=True)
        optimiser.step()
        return [x.grad, *(p.grad for p in net.parameters()), *net.parameters()]

    for there, here in zip(loss(DEVICE), loss("cpu"), strict=True):
        assert there.device.type == "second"
        torch.testing.assert_close(there.cpu(), here)


def test_models_move_copy_save_and_load(tmp_path):
    net = torch.nn.Linear(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = copy.deepcopy(net.to(DEVICE))
    assert other.weight.device.type == "second"
    torch.save(other.state_dict(), tmp_path / "net")
    net.load_state_dict(torch.load(tmp_path / "net", map_location=DEVICE))
    assert all(torch.equal(value.cpu(), before[name]) for name, value in net.state_dict().items())
    net.cpu()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_data_can_be_given_on_another_device():
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    same = parameter
    parameter.data = torch.full((3,), 2.0).to(DEVICE)
    assert same is parameter
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.data.device.type == parameter.device.type == DEVICE
    assert not parameter.requires_grad
    assert parameter.tolist() == [2, 2, 2]
    parameter.data = parameter.data[:1]
    parameter.data = parameter.cpu()
    assert parameter.tolist() == [2]
    assert parameter.device.type == "cpu"


def test_decompositions_are_those_of_the_cpu():
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x @ x.T + torch.eye(6, dtype=torch.float64)
    there = gram.to(DEVICE)
    torch.testing.assert_close(torch.linalg.cholesky(there).cpu(), torch.linalg.cholesky(gram))
    torch.testing.assert_close(torch.linalg.inv(there).cpu(), torch.linalg.inv(gram))
    torch.testing.assert_close(torch.linalg.eigh(there)[0].cpu(), torch.linalg.eigh(gram)[0])


# Memory


def test_memory_is_counted_and_limited():
    memory = torch.second
    before = memory.memory_allocated()
    memory.reset_peak_memory_stats()
    x = torch.zeros(1000, device=DEVICE)
    assert memory.memory_allocated() == memory.memory_reserved() == before + 4000
    y = x[:10].clone()
    del x
    assert memory.memory_allocated() == before + 40
    assert memory.max_memory_allocated() == before + 4040
    memory.reset_peak_memory_stats()
    assert memory.max_memory_allocated() == before + 40
    memory.set_limit(before + 1000)
    assert memory.mem_get_info(DEVICE) == (960, before + 1000)
    with pytest.raises(torch.OutOfMemoryError, match="beyond its limit"):
        torch.zeros(1000, device=DEVICE)
    assert memory.memory_allocated() == before + 40
    torch.zeros(10, device=DEVICE)
    memory.report_free(3)
    assert memory.mem_get_info() == (3, before + 1000)
    del y


@pytest.mark.parametrize("count", [1, 2])
def test_memory_runs_out_where_that_is_planted(count):
    torch.second.plant(2, count)
    seen = []
    for _ in range(5):
        try:
            seen.append(torch.ones(1, device=DEVICE).item())
        except torch.OutOfMemoryError as error:
            assert "out of memory" in str(error)  # noqa: PT017
            seen.append(None)
    assert seen == [1.0, *[None] * count, *[1.0] * (4 - count)]
    assert torch.second.allocations() == 5


def test_memory_can_run_out_in_backward():
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    y = x.exp().sum()
    torch.second.plant(1)
    with pytest.raises(torch.OutOfMemoryError):
        y.backward()
    y = x.exp().sum()
    y.backward()
    torch.testing.assert_close(x.grad.cpu(), torch.ones(8).exp())
