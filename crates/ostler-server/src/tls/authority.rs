//! The server's own certificate authority: four files in one directory, made at the first start.
//!
//! `ca.pem` is what clients trust, `ca.key` signs, `server.pem` and `server.key` are this server's. The server's
//! certificate is made again when it does not cover a name that it needs or runs out within 30 days; the authority is
//! never made again by itself, since every client would have to be told.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{Span, Timestamp, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};

use super::{TlsError, provider, read, read_certificates};

const CA_YEARS: i64 = 30;
const SERVER_DAYS: i64 = 365;
/// Renewed when fewer days than this are left.
const RENEW_DAYS: u64 = 30;

/// The authority's certificate below `dir`: what clients trust.
pub fn ca_path(dir: &Path) -> PathBuf {
    dir.join("ca.pem")
}

/// SHA-256 of the authority's certificate as `sha256:AA:BB:…`, for a person to compare.
pub fn ca_fingerprint(dir: &Path) -> Result<String, TlsError> {
    let chain = read_certificates(&ca_path(dir))?;
    let hex: Vec<String> = Sha256::digest(&chain[0]).iter().map(|byte| format!("{byte:02X}")).collect();
    Ok(format!("sha256:{}", hex.join(":")))
}

/// Makes sure that there is a server certificate for `listen` and `extra`; its path and the path of its key.
pub(super) fn ensure(dir: &Path, listen: IpAddr, extra: &[String]) -> Result<(PathBuf, PathBuf), TlsError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| TlsError::File {
        what: "make the directory",
        path: dir.to_owned(),
        source,
    })?;
    let names = wanted_names(listen, extra)?;
    let (ca, ca_key) = authority(dir)?;
    let (certificate, key) = (dir.join("server.pem"), dir.join("server.key"));
    let soon = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + days(RENEW_DAYS));
    if certificate.exists() && key.exists() {
        let chain = read_certificates(&certificate)?;
        match covers(&ca, &chain[0], &names, soon) {
            Ok(()) => return Ok((certificate, key)),
            Err(why) => {
                tracing::info!(path = %certificate.display(), why, "the server's certificate is renewed")
            }
        }
    }
    let (pem, der, key_pem) = issue(&ca_key, &names)?;
    // What was just made must hold against the authority as it is on the disk, or no client could connect.
    covers(&ca, &der, &names, soon).map_err(|why| TlsError::Authority { dir: dir.to_owned(), why })?;
    // The old certificate goes first: killed between the two, the next start finds none and makes a pair that fits.
    match std::fs::remove_file(&certificate) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(TlsError::File { what: "replace", path: certificate, source });
        }
        Ok(()) | Err(_) => {}
    }
    write_file(&key, key_pem.as_bytes(), 0o600)?;
    write_file(&certificate, pem.as_bytes(), 0o644)?;
    Ok((certificate, key))
}

fn days(n: u64) -> Duration {
    Duration::from_secs(n * 86_400)
}

/// The names a client may use for this server.
fn wanted_names(listen: IpAddr, extra: &[String]) -> Result<BTreeSet<String>, TlsError> {
    let mut names: BTreeSet<String> =
        ["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string(), Ipv6Addr::LOCALHOST.to_string()].into();
    if !listen.is_unspecified() {
        names.insert(listen.to_string());
    }
    if let Ok(host) = rustix::system::uname().nodename().to_str()
        && ServerName::try_from(host).is_ok()
    {
        names.insert(host.to_ascii_lowercase());
    }
    for name in extra {
        ServerName::try_from(name.as_str()).map_err(|_| TlsError::Name { name: name.clone() })?;
        names.insert(name.to_ascii_lowercase());
    }
    Ok(names)
}

/// Reads the authority, or makes it when neither of its files is there.
fn authority(dir: &Path) -> Result<(CertificateDer<'static>, KeyPair), TlsError> {
    let (certificate, key) = (ca_path(dir), dir.join("ca.key"));
    match (certificate.exists(), key.exists()) {
        (true, true) => {}
        (true, false) => return Err(TlsError::Half { missing: key, present: certificate }),
        (false, true) => return Err(TlsError::Half { missing: certificate, present: key }),
        (false, false) => {
            let pair = KeyPair::generate().map_err(made)?;
            let pem = ca_params(&pair).self_signed(&pair).map_err(made)?.pem();
            write_file(&key, pair.serialize_pem().as_bytes(), 0o600)?;
            write_file(&certificate, pem.as_bytes(), 0o644)?;
        }
    }
    let text = String::from_utf8_lossy(&read(&key)?).into_owned();
    let pair =
        KeyPair::from_pem(&text).map_err(|error| TlsError::Pem { path: key, why: error.to_string() })?;
    Ok((read_certificates(&certificate)?.swap_remove(0), pair))
}

/// The authority's certificate without its signature: all of it follows from the key, so that signing needs no parser.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let short: String = Sha256::digest(key.subject_public_key_info())
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Ostler authority {short}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, CA_YEARS * 365);
    params
}

/// A new key and a certificate for `names`: PEM, DER, and the key as PEM.
fn issue(
    ca_key: &KeyPair,
    names: &BTreeSet<String>,
) -> Result<(String, CertificateDer<'static>, String), TlsError> {
    let ca = ca_params(ca_key);
    let issuer = Issuer::from_params(&ca, ca_key);
    let key = KeyPair::generate().map_err(made)?;
    let mut params = CertificateParams::new(names.iter().cloned().collect::<Vec<_>>()).map_err(made)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "ostler server");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, SERVER_DAYS);
    let certificate = params.signed_by(&key, &issuer).map_err(made)?;
    Ok((certificate.pem(), certificate.der().clone(), key.serialize_pem()))
}

fn made(error: rcgen::Error) -> TlsError {
    TlsError::Make(error.to_string())
}

/// Valid from yesterday, since clocks differ, for so many days.
fn set_validity(params: &mut CertificateParams, days: i64) {
    let date = |offset: i64| {
        let moment = Timestamp::now().to_zoned(TimeZone::UTC).saturating_add(Span::new().days(offset)).date();
        rcgen::date_time_ymd(
            i32::from(moment.year()),
            moment.month().unsigned_abs(),
            moment.day().unsigned_abs(),
        )
    };
    params.not_before = date(-1);
    params.not_after = date(days);
}

/// Whether `certificate` is vouched for by `ca`, and still good for all of `names` at `when`.
fn covers(
    ca: &CertificateDer<'_>,
    certificate: &CertificateDer<'_>,
    names: &BTreeSet<String>,
    when: UnixTime,
) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned()).map_err(|error| error.to_string())?;
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider())
        .build()
        .map_err(|error| error.to_string())?;
    for name in names {
        let server = ServerName::try_from(name.as_str()).map_err(|error| error.to_string())?;
        verifier
            .verify_server_cert(certificate, &[], &server, &[], when)
            .map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

/// Writes all of a file or nothing: beside it first, then moved into its place.
fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let fail = |what| move |source| TlsError::File { what, path: path.to_owned(), source };
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail("replace")(error)),
        Ok(()) | Err(_) => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&new).map_err(fail("write"))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(fail("write"))?;
    std::fs::rename(&new, path).map_err(fail("write"))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail("write"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("tls");
        let (certificate, key) = ensure(&dir, LOOPBACK, &[]).unwrap();
        let first = std::fs::read(&certificate).unwrap();
        let print = ca_fingerprint(&dir).unwrap();
        assert_eq!(print.len(), "sha256:".len() + 32 * 3 - 1);
        ensure(&dir, LOOPBACK, &[]).unwrap();
        assert_eq!(std::fs::read(&certificate).unwrap(), first);
        assert_eq!(ca_fingerprint(&dir).unwrap(), print);
        for secret in [key, dir.join("ca.key")] {
            assert_eq!(std::fs::metadata(secret).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_new_name_makes_a_new_certificate_by_the_same_authority() {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, _) = ensure(dir.path(), LOOPBACK, &[]).unwrap();
        let first = std::fs::read(&certificate).unwrap();
        let print = ca_fingerprint(dir.path()).unwrap();
        ensure(dir.path(), LOOPBACK, &["Cloud.example.net".to_owned(), "192.0.2.7".to_owned()]).unwrap();
        assert_ne!(std::fs::read(&certificate).unwrap(), first);
        assert_eq!(ca_fingerprint(dir.path()).unwrap(), print);
        let bad = ensure(dir.path(), LOOPBACK, &["not a name".to_owned()]).unwrap_err();
        assert!(bad.to_string().contains("not a name"), "{bad}");
    }

    #[test]
    fn a_certificate_near_its_end_does_not_cover() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, key) = authority(dir.path()).unwrap();
        let names: BTreeSet<String> = ["localhost".to_owned()].into();
        let (_, der, _) = issue(&key, &names).unwrap();
        let at = |n| UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + days(n));
        assert!(covers(&ca, &der, &names, at(300)).is_ok());
        assert!(covers(&ca, &der, &names, at(367)).is_err());
    }

    #[test]
    fn half_an_authority_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        ensure(dir.path(), LOOPBACK, &[]).unwrap();
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(matches!(ensure(dir.path(), LOOPBACK, &[]), Err(TlsError::Half { .. })));
    }

    #[test]
    fn a_key_of_another_authority_is_refused() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        ensure(one.path(), LOOPBACK, &[]).unwrap();
        ensure(other.path(), LOOPBACK, &[]).unwrap();
        std::fs::copy(other.path().join("ca.key"), one.path().join("ca.key")).unwrap();
        std::fs::remove_file(one.path().join("server.pem")).unwrap();
        assert!(matches!(ensure(one.path(), LOOPBACK, &[]), Err(TlsError::Authority { .. })));
    }
}
