"""The one error type of the public face."""


class MahlstickError(ValueError):
    """Bad input or a unit that does not fit.

    The message is one sentence for a person: it names the file or field at fault and the way out.
    """
