"""Aliases, verification, clean-up and copies on a real S3 server."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import stored

from rlhf_core.aliases import keys_of, promote, resolve_alias
from rlhf_core.artifacts import fetch, list_manifests
from rlhf_core.gc import Policy, collect, orphans, plan
from rlhf_core.inventory import look
from rlhf_core.store import Store
from rlhf_core.transfer import closure, copy
from rlhf_core.verification import verify_store


def test_of_many_that_promote_at_once_each_gets_a_number_of_its_own(bucket):
    store = Store(bucket)
    made = stored.put(store, "sft", {"a": b"1"})
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: promote(store, "prod", made, str(i), checksums=False).number, range(12)))
    assert sorted(numbers) == list(range(1, 13)) and len(keys_of(store, "prod")) == 12
    assert resolve_alias(store, "@prod~11") == made.ref


def test_a_store_is_verified_cleaned_copied_and_read_from_its_copy(bucket, tmp_path):
    store, elsewhere = Store(f"{bucket}/one"), Store(f"{bucket}/two")
    made, unfinished = stored.full(store)
    old = stored.pipeline(store, "old", stored.ago(days=40))
    assert verify_store(store).damages == ()
    policy = Policy(keep_last=1, unfinished=timedelta(0))
    view = look(store)
    assert orphans(store, view, policy) == []
    collect(store, policy, plan(view, policy))
    assert {m.ref.id for m in list_manifests(store)} == {m.ref.id for m in made.values()}
    assert not any(key.startswith((unfinished.id, *(m.ref.id for m in old.values()))) for key in store.list(""))
    for manifest in closure(store, [made["ppo"]]):
        assert copy(store, elsewhere, manifest).sent == 3
        assert copy(store, elsewhere, manifest).present == 3
    folder, _ = fetch(elsewhere, made["ppo"].ref, tmp_path / "cache")
    assert (folder / "model" / "weights").read_bytes() == store.read(made["ppo"].key("model/weights"))
    weights = made["ppo"].key("model/weights")
    elsewhere.write(weights, elsewhere.read(weights)[::-1])
    assert [damage.what for damage in verify_store(elsewhere).damages] == ["content changed: its sha256 is another"]
    assert copy(store, elsewhere, made["ppo"]).sent == 1
    assert verify_store(elsewhere).damages == () and verify_store(store).damages == ()
