"""placeholder"""
def toy() -> None:
    """x"""
