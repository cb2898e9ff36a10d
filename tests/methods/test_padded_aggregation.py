import pytest
import torch

from fedrecsk.methods.padded_aggregation import combine, slice_of
from tests.reference import hetefedrec_reference as reference

N_ITEMS, SIZES = 9, (2, 3, 6)
DENOMINATORS = pytest.mark.parametrize("denominator", ["owners", "clients", "sum"])
BIAS = pytest.mark.parametrize("item_bias", [False, True], ids=["plain", "bias"])


class Federation:
    """Clients with random updates; item 0 is trained by nobody, item 1 by the large ones alone."""

    def __init__(self, sizes, clients_of, item_bias, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.sizes, self.item_bias = sizes, item_bias
        self.group = [x for x, n in enumerate(clients_of) for _ in range(n)]
        self.updates, self.touched, self.weights = [], [], []
        for x in self.group:
            width = sizes[x] + item_bias
            touched = torch.rand(N_ITEMS, generator=generator) < 0.6
            touched[0], touched[1] = False, x == len(sizes) - 1
            update = torch.randn(N_ITEMS, width, generator=generator).double()
            self.updates.append(update * touched[:, None])
            self.touched.append(touched)
            self.weights.append(float(torch.rand(1, generator=generator)) + 0.5)

    def sums(self):
        """What the server holds: one sum and one vector of weights per size."""
        sums = [torch.zeros(N_ITEMS, size + self.item_bias).double() for size in self.sizes]
        weights = [torch.zeros(N_ITEMS).double() for _ in self.sizes]
        for x, update, touched, weight in zip(
            self.group, self.updates, self.touched, self.weights, strict=True
        ):
            sums[x] += weight * update
            weights[x] += weight * touched.double()
        return sums, weights

    def combined(self, denominator):
        sums, weights = self.sums()
        return combine(
            sums,
            weights,
            total_weight=sum(self.weights),
            denominator=denominator,
            item_bias=self.item_bias,
        )


@BIAS
@DENOMINATORS
@pytest.mark.parametrize(
    ("sizes", "clients_of"),
    [
        (SIZES, (4, 3, 2)),
        (SIZES, (4, 0, 2)),
        (SIZES, (4, 3, 0)),
        (SIZES, (0, 0, 3)),
        ((4,), (5,)),
        ((3, 3), (2, 4)),
        ((1, 2, 4, 5), (2, 1, 3, 1)),
    ],
    ids=str,
)
def test_as_if_every_matrix_were_padded(sizes, clients_of, denominator, item_bias):
    federation = Federation(sizes, clients_of, item_bias)
    expected = reference.combine(
        federation.updates,
        federation.touched,
        federation.weights,
        width=sizes[-1],
        denominator=denominator,
        item_bias=item_bias,
    )
    found = federation.combined(denominator)
    assert found.shape == (N_ITEMS, sizes[-1] + item_bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@BIAS
@DENOMINATORS
def test_rows_that_nobody_trained_do_not_change(denominator, item_bias):
    change = Federation(SIZES, (4, 3, 2), item_bias).combined(denominator)
    assert not change[0].any()
    assert change[1].all()


@BIAS
@DENOMINATORS
def test_nobody_changes_nothing(denominator, item_bias):
    change = Federation(SIZES, (0, 0, 0), item_bias).combined(denominator)
    assert change.shape == (N_ITEMS, SIZES[-1] + item_bias)
    assert not change.any()


@BIAS
def test_columns_that_nobody_owns_do_not_change(item_bias):
    change = Federation(SIZES, (4, 3, 0), item_bias).combined("owners")
    assert not change[:, 3:6].any()
    assert change[2:, :2].any()


@pytest.mark.parametrize("denominator", ["owners", "clients"])
def test_one_size_is_the_plain_mean(denominator):
    federation = Federation((4,), (5,), item_bias=False)
    everything = torch.ones(N_ITEMS, dtype=torch.bool)
    federation.touched, federation.weights = [everything] * 5, [1.0] * 5
    mean = torch.stack(federation.updates).mean(0)
    torch.testing.assert_close(federation.combined(denominator), mean)


@BIAS
@DENOMINATORS
def test_groups_of_equal_sizes_are_one_group(denominator, item_bias):
    split = Federation((4, 4, 4), (2, 3, 4), item_bias)
    sums, weights = split.sums()
    whole = combine(
        [torch.stack(sums).sum(0)],
        [torch.stack(weights).sum(0)],
        total_weight=sum(split.weights),
        denominator=denominator,
        item_bias=item_bias,
    )
    torch.testing.assert_close(split.combined(denominator), whole)


def test_the_mean_over_clients_dilutes_columns_that_few_own():
    """All clients send ones: owners move every column alike, the others by who owns it."""
    sizes, clients_of = (1, 2, 3), (5, 3, 2)
    sums = [torch.full((1, size + 1), float(n)) for size, n in zip(sizes, clients_of, strict=True)]
    weights = [torch.tensor([float(n)]) for n in clients_of]
    expected = {
        "owners": [1.0, 1.0, 1.0, 1.0],
        "clients": [1.0, 0.5, 0.2, 1.0],
        "sum": [10.0, 5.0, 2.0, 10.0],
    }
    for denominator, values in expected.items():
        change = combine(sums, weights, total_weight=10.0, denominator=denominator, item_bias=True)
        torch.testing.assert_close(change, torch.tensor([values]))


@BIAS
def test_a_slice_is_the_first_columns_and_the_bias(item_bias):
    change = torch.arange(12.0).reshape(2, 6)
    columns = {False: [0, 1], True: [0, 1, 5]}[item_bias]
    assert torch.equal(slice_of(change, 2, item_bias=item_bias), change[:, columns])
    assert torch.equal(slice_of(change, 6 - item_bias, item_bias=item_bias), change)


@BIAS
@DENOMINATORS
def test_nested_tables_stay_nested_to_the_bit(denominator, item_bias):
    large = torch.randn(N_ITEMS, 6 + item_bias, generator=torch.Generator().manual_seed(3)).double()
    tables = [slice_of(large, size, item_bias=item_bias) for size in SIZES]
    for seed in range(3):
        change = Federation(SIZES, (4, 3, 2), item_bias, seed).combined(denominator)
        tables = [
            table + slice_of(change, size, item_bias=item_bias)
            for table, size in zip(tables, SIZES, strict=True)
        ]
    for table, size in zip(tables, SIZES, strict=True):
        assert torch.equal(table, slice_of(tables[-1], size, item_bias=item_bias))


@BIAS
@DENOMINATORS
def test_arguments_stay(denominator, item_bias):
    federation = Federation(SIZES, (4, 3, 2), item_bias)
    given = federation.sums()
    copies = [[tensor.clone() for tensor in tensors] for tensors in given]
    combine(
        *given,
        total_weight=sum(federation.weights),
        denominator=denominator,
        item_bias=item_bias,
    )
    for tensors, same in zip(given, copies, strict=True):
        assert all(map(torch.equal, tensors, same))
