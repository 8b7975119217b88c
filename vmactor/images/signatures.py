"""Public keys, certificates and signatures, by the ``cryptography`` library, loaded when first needed.

Its import takes several times as long as the rest of vmactor, and most programs never need it.
"""

from typing import TYPE_CHECKING

from vmactor.errors import ApkError
from vmactor.images.apk import BROKEN, TAMPERED
from vmactor.images.apk_v3 import Algorithm, ContentDigest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

# ruff: noqa: PLC0415 - see above


def load_public_key(der: bytes) -> "PublicKeyTypes":
    """A public key.

    Args:
        der: As a SubjectPublicKeyInfo.

    Raises:
        ApkError: It is not one, or of an unknown kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        return load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ApkError("the signer's public key cannot be read", advice=BROKEN) from error


def public_key_der(key: "PublicKeyTypes") -> bytes:
    """The one DER form of a key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def certificate_key(der: bytes) -> bytes:
    """The public key in an X.509 certificate, in its one DER form.

    Raises:
        ApkError: It is no certificate, or its key is of an unknown kind.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return public_key_der(x509.load_der_x509_certificate(der).public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ApkError("the signer's certificate cannot be read", advice=BROKEN) from error


def check_signature(key: "PublicKeyTypes", algorithm: Algorithm, signature: bytes, data: bytes) -> None:
    """Check that the key's owner signed the data.

    Raises:
        ApkError: That is not so.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

    digest = hashes.SHA512() if algorithm.digest is ContentDigest.CHUNKED_SHA512 else hashes.SHA256()
    try:
        match key:
            case rsa.RSAPublicKey() if "RsaPss" in algorithm.name:
                pss = padding.PSS(padding.MGF1(digest), digest.digest_size)
                key.verify(signature, data, pss, digest)
            case rsa.RSAPublicKey() if "RsaPkcs1" in algorithm.name:
                key.verify(signature, data, padding.PKCS1v15(), digest)
            case ec.EllipticCurvePublicKey() if "Ecdsa" in algorithm.name:
                key.verify(signature, data, ec.ECDSA(digest))
            case _:
                raise ApkError(f"the key cannot be one for {algorithm.name}", advice=TAMPERED)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError) as error:
        raise ApkError("Signature is invalid.", advice=TAMPERED) from error
