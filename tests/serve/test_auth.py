import stat
from pathlib import Path

import pytest

from embedlib.errors import ConfigError
from serve.auth import Key, Quota, QuotaError, add_key, client_of, hash_key, main, read_keys


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    shown: list[str] = []
    main([str(path), "alice", "--tokens_per_minute", "100"], shown.append)
    main([str(path), "bob"], shown.append)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(secret not in path.read_text() and len(secret) > 40 for secret in shown)
    keys = read_keys(path)
    assert [client_of(f"Bearer {secret}", keys) for secret in shown] == keys
    assert [(key.name, key.tokens_per_minute, key.requests_per_minute) for key in keys] == [
        ("alice", 100, None),
        ("bob", None, None),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_who_has_no_key_is_nobody() -> None:
    keys = [Key(name="alice", sha256=hash_key("emb-right"))]
    assert client_of("bearer  emb-right ", keys) == keys[0]
    for header in (None, "", "Bearer", "Bearer ", "Bearer emb-wrong", "Basic emb-right", "emb-right", "Bearer é"):
        assert client_of(header, keys) is None
    assert client_of(f"Bearer {keys[0].sha256}", keys) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("{", "Invalid JSON"),
        ('[{"name": "a", "sha256": "emb-plain"}]', "sha256"),
        ('[{"name": "a", "key": "x"}]', "key"),
        (f'[{{"name": "a", "sha256": "{"0" * 64}"}}, {{"name": "a", "sha256": "{"1" * 64}"}}]', "the same name"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_keys(tmp_path / "keys.json")


def test_a_name_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_key(tmp_path / "keys.json", "alice", None, None)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "keys.json"), "alice"])
    assert "'alice' has a key" in capsys.readouterr().err
    assert len(read_keys(tmp_path / "keys.json")) == 1


def quota(requests: int | None = None, tokens: int | None = None) -> Quota:
    key = Key(name="a", sha256="0" * 64, requests_per_minute=requests, tokens_per_minute=tokens)
    return Quota.of(key, now=0.0)


def test_requests_and_tokens_fill_again() -> None:
    limited = quota(requests=2, tokens=600)
    limited.take(300, 0.0)
    limited.take(300, 0.0)
    with pytest.raises(QuotaError, match="a: 2 requests a minute are used up; try again in 30 s") as caught:
        limited.take(1, 0.0)
    assert caught.value.retry_after_s == 30
    with pytest.raises(QuotaError, match="600 tokens a minute are used up; try again in 30 s"):
        limited.take(600, 30.0)
    limited.take(600, 60.0)  # the refusals took nothing


def test_more_than_a_minutes_worth_waits_for_a_full_bucket_and_is_owed() -> None:
    limited = quota(tokens=60)
    limited.take(180, 0.0)
    with pytest.raises(QuotaError, match="try again in 121 s"):
        limited.take(1, 0.0)
    limited.take(1, 121.0)


def test_without_limits_nothing_is_refused() -> None:
    free = quota()
    for _ in range(1000):
        free.take(10**9, 0.0)
