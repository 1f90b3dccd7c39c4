//! The TLS port: own authority, certificates of others.

use ostler_server::{Limits, Server, TlsIdentity, TlsListen};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;

use crate::support::{Site, Via, config};

fn ca(site: &Site) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(ostler_server::ca_path(&site.tls_dir())).unwrap()
}

#[tokio::test]
async fn trusted_by_its_authority_alone() {
    let (site, other) = (Site::start().await, Site::start().await);
    for name in ["localhost", "127.0.0.1"] {
        site.tls_connect(ca(&site), name, "h2").await.unwrap();
    }
    let error = site.tls_connect(ca(&other), "localhost", "h2").await.unwrap_err();
    assert!(
        error.to_string().contains("UnknownIssuer") || error.to_string().contains("certificate"),
        "{error}"
    );
    assert!(site.tls_connect(ca(&site), "elsewhere.example", "h2").await.is_err());
    assert!(ostler_server::ca_fingerprint(&site.tls_dir()).unwrap().starts_with("sha256:"));
    // Whoever comes over TLS needs a token, whatever user it is.
    site.get("/v1/vms").via(Via::Tls).refused(401, "unauthenticated").await;
    let token = site.token(json!({"name": "t", "role": "reader", "project": "default"})).await;
    for via in [Via::Tls, Via::Tls2] {
        assert_eq!(site.get("/v1/vms").via(via).token(&token).send().await.status, 200);
    }
    site.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_certificate_made_elsewhere_is_used() {
    let site = Site::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut with_files = config(&dir, Limits::default());
    with_files.plain_http = None;
    with_files.tls = Some(TlsListen {
        addr: "127.0.0.1:0".parse().unwrap(),
        identity: TlsIdentity::Files {
            certificate: site.tls_dir().join("server.pem"),
            key: site.tls_dir().join("server.key"),
        },
    });
    Server::bind(site.cloud.clone(), with_files.clone()).await.unwrap();
    with_files.tls.as_mut().unwrap().identity = TlsIdentity::Files {
        certificate: site.tls_dir().join("server.pem"),
        key: site.tls_dir().join("ca.key"),
    };
    let error = Server::bind(site.cloud.clone(), with_files).await.unwrap_err();
    assert!(error.to_string().contains("server.pem"), "{error}");
    site.stop().await;
}
