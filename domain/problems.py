"""Business errors with the contract's stable codes; the API renders them as RFC 9457 problem documents."""

HTTP_STATUS: dict[str, int] = {
    "VALIDATION_FAILED": 422,
    "EMAIL_ALREADY_EXISTS": 400,
    "INVALID_CREDENTIALS": 401,
    "UNAUTHENTICATED": 401,
    "CREDENTIAL_LOCKED": 403,
    "CREDENTIAL_EXPIRED": 403,
    "FORBIDDEN": 403,
    "PASSWORD_NEEDED": 403,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "ORDER_NOT_FOUND": 404,
    "ORDER_NOT_CANCELLABLE": 400,
    "ORDER_NOT_AMENDABLE": 400,
    "INSTRUMENT_NOT_FOUND": 404,
    "INSTRUMENT_NOT_TRADING": 400,
    "PRICE_NOT_ON_TICK": 400,
    "QUANTITY_NOT_ON_LOT": 400,
    "MIN_NOTIONAL": 400,
    "PRICE_OUT_OF_BAND": 400,
    "MARGIN_MODE_NOT_CHANGEABLE": 400,
    "POSITION_NOT_FOUND": 404,
    "POSITION_IS_CROSS": 400,
    "RISK_LIMIT_EXCEEDED": 400,
    "INSUFFICIENT_MARGIN": 400,
    "MARK_PRICE_UNAVAILABLE": 503,
    "INSUFFICIENT_FUNDS": 400,
    "DUPLICATE_CLIENT_ORDER_ID": 409,
    "POSITION_IN_LIQUIDATION": 409,
    "POSITION_CHANGED": 409,
    "REQUEST_TIMEOUT": 408,
    "REQUEST_TOO_LARGE": 413,
    "RATE_LIMITED": 429,
    "REMOTE_SERVICE_ERROR": 500,
    "OVERLOADED": 503,
}


class Problem(Exception):  # noqa: N818 - the standard's word for it
    """A request that cannot be served: a stable `code`, a sentence for people, and extra members."""

    def __init__(self, code: str, detail: str, **extra: object) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.extra = extra

    @property
    def status(self) -> int:
        """The HTTP status of this code."""
        return HTTP_STATUS[self.code]
