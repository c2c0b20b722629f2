"""Digests that processes compare."""

from monarchrt.models.processes.alike import samples


def test_samples_of_a_large_file(tmp_path):
    """Either end and three blocks between them, with the size; nothing else is read."""
    size, file = 2**25 + 3, tmp_path / "large"
    file.write_bytes(bytes(size))
    [before] = samples([file])

    def changed(place):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"1")
        [after] = samples([file])
        file.write_bytes(bytes(size))
        return after != before

    assert [changed(n) for n in (0, size // 4, size // 2, 3 * size // 4, size - 1)] == [True] * 5
    assert not changed(size // 8)
    file.write_bytes(bytes(size + 1))
    assert samples([file]) != [before]
