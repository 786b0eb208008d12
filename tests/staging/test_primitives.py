"""JAX grows; what its programs may contain is compared here with what jaxgrad knows of."""

import importlib.metadata
import json
import re
import subprocess
import sys

import jax
import pytest

from jaxgrad._jaxpr.views import _READERS
from jaxgrad._staging.batch_axis import LEFT_OUT, RULES

# Modules whose primitives are in no program of a user's: languages for kernels, which occur inside
# of a kernel only (`pallas_call`, which a program has, is in `LEFT_OUT`), and JAX's own tests.
ELSEWHERE = (
    "jax._src.internal_test_util",
    "jax._src.lax_reference",
    "jax._src.pallas",
    "jax._src.public_test_util",
    "jax._src.test_",
    "jax._src.thunky",
    "jax._src.tpu_custom_call",
)

LISTING = """
import importlib, json, pkgutil, sys
import jax._src, jax.experimental.pallas
from jax.extend.core import Primitive

elsewhere = tuple(sys.argv[1:])
for module in pkgutil.walk_packages(jax._src.__path__, "jax._src.", onerror=lambda name: None):
    if not module.name.startswith(elsewhere):
        try:
            importlib.import_module(module.name)
        except ImportError:
            pass  # it needs something that is not installed, as its user would find
found = {}
for name, module in sorted(sys.modules.items()):
    if name.startswith("jax._src."):
        for value in list(vars(module).values()):
            if isinstance(value, Primitive):
                found.setdefault(value.name, []).append(name)
print(json.dumps(found))
"""

# Names of `RULES` and `LEFT_OUT` that not every supported JAX has: the first release, or the last,
# that was seen to have them.
SINCE = {
    (0, 12): """
        log2 one_minus_square pbroadcast_dynamic polynomial program_order reduced_vary_cast relayout
        unreduced_pmax unreduced_pmin vary_unreduced_cast xla_metadata_call
    """,
}
UNTIL = {
    (0, 10): """
        box_get box_set log_extend log_read new_box new_log pbroadcast_done pbroadcast_start
        psum_start reduced_vary_cast_p shard_alike unreduced_psum_start
        unreduced_reduce_scatter_start vary_unreduced_cast_p
    """,
}


@pytest.fixture(scope="module")
def registered():
    """The modules of each primitive, by its name.

    A process of its own, as the answer must not depend on what other tests have imported, nor they
    on what is imported here.
    """
    command = [sys.executable, "-c", LISTING, *ELSEWHERE]
    listing = subprocess.run(command, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    return json.loads(listing.stdout.splitlines()[-1])


def installed():
    return jax.__version_info__[:2]


def test_each_primitive_of_this_jax_is_known(registered):
    """A new primitive is named here: give it a rule, a view, or a reason to be left out.

    Those of JAX are the primitives that stand in a module of `jax._src`, where all of JAX is
    defined, under any name. The registries of rules would be narrower, and are private:
    `call_hi_primitive` and the operations on references are never lowered, so that the table of
    lowerings lacks them, and a primitive need not have a rule for `vmap` or a derivative.
    `jax.extend.core.primitives` lacks `tile`, `stack` and `unstack`. What `jax.experimental`
    defines by itself (sparse arrays, recurrent networks on cuDNN) is refused without a reason.
    """
    known = {*RULES, *_READERS, *LEFT_OUT}
    new = {
        name: modules[0]
        for name, modules in registered.items()
        if name not in known and not all(m.startswith(ELSEWHERE) for m in modules)
    }
    assert not new, f"jax {jax.__version__} has primitives that no table knows: {new}"


def test_primitives_are_found_wherever_jax_defines_them(registered):
    assert {"tile", "stack", "unstack", "get", "call_hi_primitive", "custom_vjp_call"} <= {
        *registered
    }
    assert len(registered) > 250


def test_what_is_left_out_has_no_rule():
    assert not LEFT_OUT.keys() & {*RULES, *_READERS}


def test_no_entry_outlives_its_primitive(registered):
    absent = {*RULES, *LEFT_OUT} - {*registered, "jaxgrad_tap"}
    expected = {n for v, names in SINCE.items() if v > installed() for n in names.split()} | {
        n for v, names in UNTIL.items() if v < installed() for n in names.split()
    }
    assert absent <= expected, f"jax {jax.__version__} has no {sorted(absent - expected)}"
    here = f"{SINCE.get(installed(), '')} {UNTIL.get(installed(), '')}".split()
    assert {*here} <= {*registered}


def test_releases_that_are_no_longer_supported_are_not_listed():
    (bound,) = (
        (int(match[1]), int(match[2]))
        for requirement in importlib.metadata.requires("jaxgrad") or ()
        if (match := re.match(r"jax>=(\d+)\.(\d+)", requirement))
    )
    assert all(last >= bound for last in UNTIL), "drop these names: no supported JAX has them"
    assert all(first > bound for first in SINCE), "every supported JAX has these: list no release"
