//! TLS settings: one trusted set of authorities, nothing else special.

use std::io;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use crate::target::bare_host;
use crate::{Ca, ClientError, Result};

pub(crate) struct Tls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) name: ServerName<'static>,
}

/// Reads the authorities; `target` is for the error's text.
pub(crate) fn tls(host: &str, ca: &Ca, target: &str) -> Result<Tls> {
    let fail = |source: io::Error| ClientError::Tls { target: target.to_owned(), source };
    let roots = match ca {
        Ca::System => system_roots(),
        Ca::Pem(pem) => roots_of(pem, "the given certificates").map_err(fail)?,
        Ca::File(path) => {
            let pem = std::fs::read(path)
                .map_err(|e| fail(io::Error::new(e.kind(), format!("{}: {e}", path.display()))))?;
            roots_of(&pem, &path.display().to_string()).map_err(fail)?
        }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| fail(io::Error::other(e)))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(bare_host(host).to_owned()).map_err(|e| fail(io::Error::other(e)))?;
    Ok(Tls { config: Arc::new(config), name })
}

/// What of this machine's store can be read; a damaged certificate there is not ours to complain of.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

fn roots_of(pem: &[u8], whence: &str) -> io::Result<RootCertStore> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("{whence}: {what}"));
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|e| bad(format!("not PEM: {e}")))?;
        roots.add(certificate).map_err(|e| bad(format!("not a certificate of an authority: {e}")))?;
    }
    if roots.is_empty() {
        return Err(bad("there is no certificate in it".to_owned()));
    }
    Ok(roots)
}
