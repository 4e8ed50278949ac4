"""Looking up nodes of a graph."""

from networks import SmallResNet, ThreeLayer, small_resnet
from torch import fx, nn

from dynamize.graph.extract import extract
from dynamize.graph.nodes import nodes_by_name, output_value, placeholder, positions
from dynamize.graph.trace import trace


def test_the_two_ends_of_a_network() -> None:
    graph = trace(ThreeLayer(), ThreeLayer.shape).graph
    assert placeholder(graph).name == "x"
    assert placeholder(graph).meta["shape"] == (1, 3, 8, 8)
    assert output_value(graph).target == "linear"
    assert output_value(graph).meta["shape"] == (1, 5)


def test_the_two_ends_of_a_region() -> None:
    region = extract(trace(ThreeLayer(), ThreeLayer.shape), "relu", "relu_1")
    assert placeholder(region.graph).meta["shape"] == (1, 4, 8, 8)
    assert output_value(region.graph).name == "relu_1"


def test_a_graph_that_changes_nothing_hands_its_input_on() -> None:
    graph = fx.symbolic_trace(nn.Sequential()).graph
    assert output_value(graph) is placeholder(graph)


def test_of_several_inputs_the_first_is_meant() -> None:
    graph = fx.Graph()
    first, second = graph.placeholder("images"), graph.placeholder("mask")
    graph.output(graph.call_method("mul", (first, second)))
    assert placeholder(graph) is first


def test_names_and_positions_follow_the_order_of_execution() -> None:
    graph = trace(small_resnet(), SmallResNet.shape).graph
    nodes = list(graph.nodes)
    assert list(nodes_by_name(graph).values()) == nodes
    assert all(nodes_by_name(graph)[node.name] is node for node in nodes)
    assert all(nodes[i].name == name for name, i in positions(graph).items())
    assert len(positions(graph)) == len(nodes)
    added = next(node for node in nodes if node.op == "call_module")
    with graph.inserting_before(added):
        clone = graph.call_method("clone", (placeholder(graph),))
    assert positions(graph)[clone.name] + 1 == positions(graph)[added.name]
