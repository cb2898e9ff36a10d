from fedrecsk.engine.traffic import dense_bytes, sparse_row_bytes


def test_dense_tensors_travel_as_four_byte_floats():
    assert dense_bytes() == 0
    assert dense_bytes((5,)) == 20
    assert dense_bytes((3, 2)) == 24
    assert dense_bytes((3, 2), (5,), ()) == 48  # a scalar is one number


def test_sparse_rows_travel_with_their_number():
    assert sparse_row_bytes(0, 8) == 0
    assert sparse_row_bytes(1, 8) == 36
    assert sparse_row_bytes(10, 1) == 80
