"""The error that a user sees."""

from model.common.errors import UserError


def test_a_message_is_one_line_whatever_the_names_in_it():
    message = str(UserError("a\nb \x1b[31m: remove it"))
    assert message == r"a b \x1b[31m: remove it"
    assert message.isprintable()
