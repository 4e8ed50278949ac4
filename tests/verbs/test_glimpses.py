"""Where a network looked, and what it answered after each look."""

import torch

import dynamize as dz
from dynamize.nn.piece import Setting
from dynamize.verbs.glimpses import glimpses, looks_at_parts

SHAPE = (1, 16, 12)


def test_each_look_has_its_box_and_the_answer_so_far() -> None:
    net = dz.source("dynamize:digits_resnet", pretrained=True)
    network = dz.convert(net, [dz.GlanceFocus(glance=9, crops=2, crop=0.5)], SHAPE).eval()
    images = 2 * torch.randn(30, *SHAPE, generator=torch.Generator().manual_seed(0))
    setting = Setting({"glance": 2.5, "focus-1": None, "focus-2": 3.0}, combine="product")
    routed = network.run(images, setting)
    assert len(set(routed.exits.tolist())) == 3
    found = glimpses(network, images, setting)
    for i, looks in enumerate(found):
        names = [look.name for look in looks]
        assert names == ["glance", "focus-2", "main"][: len(names)]
        assert len(looks) == {0: 1, 2: 2, 3: 3}[int(routed.exits[i])]
        assert looks[-1].answer == int(routed.logits[i].argmax())
        assert looks[-1].confidence == float(routed.logits[i].softmax(0).max())
        assert [look.box is not None for look in looks] == [False, True, False][: len(looks)]
        if len(looks) > 1:
            left, top, width, height = looks[1].box or ()
            assert (width, height) == (6 / 16, 8 / 16)
            assert 2 / 16 <= left <= 8 / 16  # a narrow picture lies in the middle of its square
            assert 0 <= top <= 0.5
    assert looks_at_parts(network)
    assert not looks_at_parts(dz.convert(net, [dz.Exits()], (1, 8, 8)))
