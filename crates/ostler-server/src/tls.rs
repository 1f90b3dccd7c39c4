//! TLS of the server: certificate, key and settings. Called by `Server::bind`, and again each day for renewal.
//!
//! What always holds: only `ring` does the arithmetic; a renewed certificate is used by the next handshake without a
//! restart; the authority's key never leaves its directory.

mod authority;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

pub use authority::{ca_fingerprint, ca_path};

use crate::config::{TlsIdentity, TlsListen};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot {what} {path}")]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not valid PEM: {why}")]
    Pem { path: PathBuf, why: String },
    #[error(
        "{missing} is not there but {present} is: restore it from a backup, or move {present} away to have a new \
         authority made (clients then need the new ca.pem)"
    )]
    Half { missing: PathBuf, present: PathBuf },
    #[error("{name:?} is neither a DNS name nor an IP address, so no certificate can be made for it")]
    Name { name: String },
    #[error(
        "the certificate authority in {dir} cannot vouch for this server ({why}): restore ca.pem and ca.key from a \
         backup, or move both away to have new ones made"
    )]
    Authority { dir: PathBuf, why: String },
    #[error("the certificate {path} cannot be used: {why}")]
    Unusable { path: PathBuf, why: String },
    #[error("cannot make a certificate: {0}")]
    Make(String),
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The server's certificate, replaced in place when it is renewed.
#[derive(Debug)]
pub(crate) struct ServerTls {
    listen: TlsListen,
    key: RwLock<Arc<CertifiedKey>>,
}

impl ServerTls {
    /// Reads the certificate, or makes it (and its authority) where none is there yet.
    pub(crate) fn load(listen: &TlsListen) -> Result<Arc<Self>, TlsError> {
        let key = certified_key(listen)?;
        Ok(Arc::new(Self { listen: listen.clone(), key: RwLock::new(key) }))
    }

    /// Reads the files again, and renews what runs out soon.
    pub(crate) fn refresh(&self) -> Result<(), TlsError> {
        let key = certified_key(&self.listen)?;
        *self.key.write() = key;
        Ok(())
    }

    /// Settings for accepted connections. Client certificates for nodes will be asked for here.
    pub(crate) fn config(self: &Arc<Self>) -> Result<Arc<rustls::ServerConfig>, TlsError> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Make(error.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for ServerTls {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key.read().clone())
    }
}

fn certified_key(listen: &TlsListen) -> Result<Arc<CertifiedKey>, TlsError> {
    let (certificate, key) = match &listen.identity {
        TlsIdentity::Own { dir, names } => authority::ensure(dir, listen.addr.ip(), names)?,
        TlsIdentity::Files { certificate, key } => (certificate.clone(), key.clone()),
    };
    let chain = read_certificates(&certificate)?;
    let private = PrivateKeyDer::from_pem_slice(&read(&key)?)
        .map_err(|error| TlsError::Pem { path: key.clone(), why: error.to_string() })?;
    CertifiedKey::from_der(chain, private, &provider())
        .map(Arc::new)
        .map_err(|error| TlsError::Unusable { path: certificate, why: error.to_string() })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::File { what: "read", path: path.to_owned(), source })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |why: String| TlsError::Pem { path: path.to_owned(), why };
    let chain = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem(error.to_string()))?;
    if chain.is_empty() {
        return Err(pem("there is no certificate in it".to_owned()));
    }
    Ok(chain)
}
