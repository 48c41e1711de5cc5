package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// exitInterrupted is the exit status after a signal, as in shells for SIGINT.
// [cli.ExitFailed] is that of a broken promise, and of a demo that could not run.
const exitInterrupted = 130

const usage = `demo shows a key rotation live, with workloads that are in use.

Usage:
  demo [--svids N] [--max-delay DURATION] [-o text|json] [-v]

It runs a signing server, a node agent on a Unix socket and a few workload
processes on this machine. The workloads get their identities (SVIDs) from the
agent with a standard SPIFFE client and call each other over mutual TLS.

  --svids N             identities on the node; all but a few are idle (default 200)
  --max-delay DURATION  longest random delay before the agent reacts to the taint of
                        a key (default 10s; in the agent 60s)
  -o text|json          format of the report (default text). With json, standard output
                        is one JSON document and the timeline goes to standard error
  -v                    write the logs of server and agent to standard error

Exit status: 0 every promise held; 1 a promise was broken, or the demo could not
run; 2 wrong command line; 130 interrupted. The demo stops its processes and removes
its files, except after SIGKILL.

The fields of the JSON report (null: did not happen):
  ok                              every promise held
  broken                          names of the broken promises
  promises                        name, promise, measured, held
  svids, workloads                number of identities and of workloads
  handshakes, failed_handshakes   mutual TLS calls between workloads, and how many of them failed
  first_failure                   error of the first failed call or workload
  longest_gap_seconds             longest time that a workload had no valid SVID
  max_delay_seconds               longest random delay allowed
  delay_seconds                   the random delay
  taint_to_seen_seconds           until the agent saw that the old key is tainted
  taint_to_first_renewal_seconds  until the first renewal reached the server
  taint_to_in_use_seconds         until every workload had an SVID of the new key
  taint_to_settled_seconds        until nothing on the node depended on the old key
  taint_to_agreed_seconds         until the agent had reported that to the server
  renewals                        renewals that reached the server after the taint
  most_renewals_per_second        most of them in any one second
  jwt                             same_during_taint, failed_requests, after_removal ("replaced",
                                  "kept", or empty without removal), removal_to_replaced_seconds
  safe_to_remove                  for the old key of each type: type, key, safe (at the removal),
                                  taint_to_safe_seconds, not_before (when it would be safe)
  stuck                           the step that did not end in time
  elapsed_seconds                 duration of the demo
`

// settings are chosen by flags and tests.
type settings struct {
	svids    int
	maxDelay time.Duration
	json     bool
	verbose  bool

	workloads int
	refresh   time.Duration // between two bundle refreshes of the agent
	pause     time.Duration // between steps, for the reader
	rate      int           // renewals per second after a taint; zero: the agent's default
}

// run executes a command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && args[0] == workloadArg {
		if err := runWorkload(ctx, os.Stdin, stdout); err != nil {
			fmt.Fprintln(stderr, cli.PrintableLines(err.Error()))
			return cli.ExitFailed
		}
		return cli.ExitOK
	}
	s, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return cli.ExitOK
	case err != nil:
		fmt.Fprintf(stderr, "demo: %s\nRun \"demo -h\" for help.\n", cli.PrintableLines(err.Error()))
		return cli.ExitPermanent
	}
	return play(ctx, s, stdout, stderr)
}

func parse(args []string) (settings, error) {
	s := settings{workloads: 5, refresh: 5 * time.Second, pause: 2 * time.Second}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.IntVar(&s.svids, "svids", 200, "")
	flags.DurationVar(&s.maxDelay, "max-delay", 10*time.Second, "")
	form := flags.String("o", "text", "")
	flags.BoolVar(&s.verbose, "v", false, "")
	rest, err := cli.ParseFlags(flags, args)
	switch {
	case err != nil:
		return s, err
	case len(rest) > 0:
		return s, fmt.Errorf("unexpected argument %q", rest[0])
	case s.svids < s.workloads || s.svids > maxSVIDs:
		return s, fmt.Errorf("--svids is %d: use %d (one for each workload) to %d", s.svids, s.workloads, maxSVIDs)
	case s.maxDelay < time.Millisecond || s.maxDelay > time.Hour:
		return s, fmt.Errorf("--max-delay is %v: use 1ms to 1h", s.maxDelay)
	case *form != "text" && *form != "json":
		return s, fmt.Errorf("-o is %q: use text or json", *form)
	}
	s.json = *form == "json"
	return s, nil
}

// maxSVIDs limits the duration of a demo.
const maxSVIDs = 20_000

// play runs the demo, prints the report and returns the exit status.
func play(ctx context.Context, s settings, stdout, stderr io.Writer) int {
	timeline := stdout
	if s.json {
		timeline = stderr
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	screen := newScreen(timeline, cancel)
	log := slog.New(slog.DiscardHandler)
	if s.verbose {
		log = slog.New(cli.NewTextHandler(stderr, slog.LevelDebug, "15:04:05.000", cli.Colored(stderr, os.Getenv)))
		screen.live = false // log lines would interrupt a redrawn line
	}
	report, err := rotate(ctx, s, screen, log)
	screen.clear()
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "demo: interrupted; all processes are stopped and all files removed")
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(stderr, "demo: %s\n", cli.PrintableLines(err.Error()))
		return cli.ExitFailed
	}
	if s.json {
		err = cli.PrintJSON(stdout, report)
	} else {
		err = report.print(stdout, screen)
	}
	if err != nil {
		fmt.Fprintf(stderr, "demo: write the report: %v\n", err)
		return cli.ExitFailed
	}
	if !report.OK {
		fmt.Fprintf(stderr, "demo: broken promise: %s\n", strings.Join(report.Broken, ", "))
		return cli.ExitFailed
	}
	return cli.ExitOK
}
