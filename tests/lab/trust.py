"""Scenarios of machines that do not belong, and of nodes that lie: rows 27 to 31, 36 and 39."""

from oracles import Result
from registry import scenario
from trial import Lab

JOINING = "node --join (joining with tokens)"
LIAR = "a node that lies: MOEMESH_LIAR=/path/of/its/program"


@scenario("27", "a node without a token", "refused, the cluster serves on")
def no_token(lab: Lab, result: Result) -> None:
    result.lacks(JOINING)


@scenario("28", "a token used twice, expired, by 100 at once", "exactly one gets in")
def token_reuse(lab: Lab, result: Result) -> None:
    result.lacks(JOINING)


@scenario("29", "another router at the router's address", "the node refuses, the secret never leaves it")
def man_in_the_middle(lab: Lab, result: Result) -> None:
    result.lacks(JOINING)


@scenario("30", "a copied certificate without its key", "refused")
def copied_certificate(lab: Lab, result: Result) -> None:
    result.lacks("nothing here: the program never presents a key it does not have; mesh-net's tests do, `a_copied_certificate_without_its_key_does_not`")


@scenario("31", "a node revoked while it serves", "cut off <= 1 s, cannot return")
def revoked(lab: Lab, result: Result) -> None:
    result.lacks("nodes revoke")


@scenario("36", "a node that answers nonsense", "all rejected, quarantined after 3, O1")
def nonsense(lab: Lab, result: Result) -> None:
    result.lacks(LIAR)


@scenario("39", "a node whose answers drip", "as a dead one: stall <= 2 s, O1")
def drip(lab: Lab, result: Result) -> None:
    result.lacks(LIAR)
