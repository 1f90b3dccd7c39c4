//! The conformance suite on real QEMU processes, under TCG.

mod common;

use common::QemuFixture;
use ostler_qemu::conformance;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            conformance::run(stringify!($name), &mut QemuFixture::new()).await;
        })*

        #[test]
        fn no_case_is_left_out() {
            assert_eq!([$(stringify!($name)),*], conformance::CASES);
        }
    };
}

cases!(
    start_runs_and_is_listed,
    duplicate_start_is_refused,
    racing_starts_make_one_machine,
    paused_start_waits_for_resume,
    pause_and_resume,
    reset_goes_on_running,
    powerdown_reaches_the_guest,
    guest_power_off_is_seen_and_kept,
    guest_panic_is_seen,
    guest_reset_is_seen,
    save_and_restore,
    failed_save_changes_nothing,
    restore_refuses_a_broken_state,
    quit_ends_the_process,
    kill_ends_the_process,
    killed_process_is_seen,
    agent_restart_adopts,
    agent_restart_sees_what_happened_meanwhile,
    forget_spares_the_living,
    start_again_after_the_end,
    unknown_machines_are_no_error,
    bad_specs_are_refused,
    disks_come_and_go,
    disks_are_found_by_another_agent,
    a_guest_may_keep_its_disk,
    disks_that_do_not_fit_are_refused,
    disks_grow_and_never_shrink,
    limits_are_set_and_lifted,
    snapshots_are_of_all_disks_or_none,
    streams_shorten_the_chain,
    a_cancelled_stream_changes_nothing,
    places_are_kept_by_a_saved_state,
    layers_in_the_middle_are_merged,
);
