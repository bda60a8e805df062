"""A client of the exchange's public API: REST and WebSockets, typed. It needs nothing else of this repository."""

from client.account import Account
from client.api_key import ApiKey
from client.errors import ExchangeError, Refused, UnavailableError
from client.exchange import Exchange
from client.models import NewOrder, Order
from client.session import Operator, Session, register, sign_in
from client.streams import LocalBook, Topic, books, market_messages, user_messages

__all__ = [
    "Account",
    "ApiKey",
    "Exchange",
    "ExchangeError",
    "LocalBook",
    "NewOrder",
    "Operator",
    "Order",
    "Refused",
    "Session",
    "Topic",
    "UnavailableError",
    "books",
    "market_messages",
    "register",
    "sign_in",
    "user_messages",
]
