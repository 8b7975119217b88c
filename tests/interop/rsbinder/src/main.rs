//! Speaks to an `IVirtualMachineService` on a unix socket as a guest does, and prints what came of it.
//!
//! `rsbinder-peer SOCKET VERSION STEP...`, one line of output for each step, after the line of the session.

use std::process::ExitCode;
use std::time::Duration;

use rsbinder::rpc::RpcSession;
use rsbinder::{ExceptionCode, Parcel, Result, SIBinder, Status, StatusCode, FLAG_ONEWAY};

const DESCRIPTOR: &str = "android.system.virtualmachineservice.IVirtualMachineService";

/// A method: token, arguments, then the exception, if any, in words.
fn call(root: &SIBinder, token: &str, code: u32, arguments: impl Fn(&mut Parcel) -> Result<()>) -> Result<String> {
    let remote = root.as_remote().ok_or(StatusCode::BadType)?;
    let mut data = remote.prepare_transact(false)?;
    data.write(token)?;
    arguments(&mut data)?;
    let mut reply = remote.submit_transact(code, &data, 0)?.ok_or(StatusCode::UnexpectedNull)?;
    let status: Status = reply.read()?;
    Ok(match status.exception_code() {
        ExceptionCode::None => "ok".to_string(),
        code => format!(
            "exception {} {} {}",
            code as i32,
            status.service_specific_error(),
            status.message().unwrap_or("")
        ),
    })
}

fn oneway(root: &SIBinder, code: u32) -> Result<String> {
    let remote = root.as_remote().ok_or(StatusCode::BadType)?;
    let mut data = remote.prepare_transact(false)?;
    data.write(DESCRIPTOR)?;
    remote.submit_transact(code, &data, FLAG_ONEWAY)?;
    Ok("sent".to_string())
}

fn step(root: &SIBinder, text: &str) -> Result<String> {
    let parts: Vec<&str> = text.splitn(3, ':').collect();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<i32>().ok()).unwrap_or(0);
    let none = |_: &mut Parcel| Ok(());
    match parts[0] {
        "ping" => root.ping_binder().map(|()| "ok".to_string()),
        "started" => call(root, DESCRIPTOR, 1, none),
        "ready" => call(root, DESCRIPTOR, 2, none),
        "finished" => call(root, DESCRIPTOR, 3, |data| data.write(&number(1))),
        "error" => call(root, DESCRIPTOR, 4, |data| {
            data.write(&number(1))?;
            data.write(parts.get(2).copied().unwrap_or(""))
        }),
        "code" => call(root, DESCRIPTOR, number(1) as u32, none),
        "stranger" => call(root, "a.b.IStranger", 1, none),
        "oneway" => oneway(root, number(1) as u32),
        _ => Err(StatusCode::BadValue),
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let version = arguments[1].parse::<u32>().map_err(|_| StatusCode::BadValue)?;
    let session = RpcSession::setup_unix_client_android13plus(&arguments[0], version)?;
    session.set_timeout(Some(Duration::from_secs(30)));
    let threads = session.negotiate(10)?;
    let identity = session.get_session_id()?;
    let root = session.get_root()?;
    let spoken = session.wire_protocol_version().ok_or(StatusCode::BadValue)?;
    println!("session version {spoken} threads {threads} identity {}", identity.len());
    for text in &arguments[2..] {
        match step(&root, text) {
            Ok(outcome) => println!("{text}: {outcome}"),
            Err(status) => println!("{text}: status {}", i32::from(status)),
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.len() < 2 {
        eprintln!("rsbinder-peer SOCKET VERSION STEP...");
        return ExitCode::from(2);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(status) => {
            println!("no session: status {}", i32::from(status));
            ExitCode::FAILURE
        }
    }
}
