"""`[login]` of a preset: how `cloister login` gets tokens for a product, and where they may go.

Values only; what may stand in them is for `login_check`. They are data because each provider differs
in small things (the body's form, a fixed redirect port, a parameter of its own), and a user's own
preset can describe a provider that we never heard of. A login keeps a copy of the table it was made
with, so that a refresh token goes to the address it came from, whatever a preset says later.

Public clients only (RFC 8252 section 8.4): there is no client secret, for one that is installed with
a program is none.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Body = Literal["form", "json"]


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`[login]`: in a preset, how `cloister login` gets OAuth tokens for the product (RFC 6749, RFC 7636)."""

    token_url: str
    """Where codes and refresh tokens are exchanged for access tokens."""
    client_id: str
    """The public client's id at the provider."""
    hosts: tuple[str, ...]
    """The only hosts the access token may be sent to."""
    authorize_url: str = ""
    """Where the person agrees, in a browser. Empty when there is only a device flow."""
    device_url: str = ""
    """Where a device code is asked for (RFC 8628), for `cloister login --device`."""
    revoke_url: str = ""
    """Where `cloister logout` revokes the refresh token (RFC 7009)."""
    scopes: tuple[str, ...] = ()
    """What is asked for."""
    redirect: tuple[str, ...] = ("http://127.0.0.1:{port}/callback",)
    """Loopback addresses that the provider redirects to, tried in this order; `{port}` is any free port."""
    paste_redirect: str = ""
    """A page of the provider that shows a code to paste, for a browser on another machine."""
    authorize_parameters: dict[str, str] = msgspec.field(default_factory=dict)
    """More parameters of the address that is opened."""
    exchange: Body = "form"
    """How the code is sent: as a form, as RFC 6749 says, or as JSON."""
    refresh: Body = "form"
    """How a refresh token is sent, and a token to be revoked."""
    state_in_exchange: bool = False
    """Whether `state` is sent with the code as well."""
    scope_in_refresh: bool = False
    """Whether the scopes are sent with a refresh token."""
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """Headers that model requests with this access token need; those of a list, such as `anthropic-beta`, are
    added to what the agent sent."""
    product: Literal["", "claude", "codex"] = ""
    """Whose form the product's own login file has; empty when none is known."""
    product_file: str = ""
    """That file, below the home: what `cloister login --from-product` reads, and where the agent finds placeholders."""
