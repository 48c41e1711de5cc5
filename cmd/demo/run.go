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

// The exit codes.
const (
	exitOK          = 0
	exitBroken      = 1 // a promise was broken, or the demo could not run
	exitUsage       = 2
	exitInterrupted = 130 // as shells have it for a process ended by SIGINT
)

const usage = `demo replaces the signing keys under workloads that are in use, in front of your eyes.

Usage:
  demo [-svids N] [-max-delay DURATION] [-o text|json] [-v]

It runs everything by itself on this machine and leaves nothing behind: a
signing server, a node agent on a real Unix socket, and a few workloads, which
are processes of their own. They get their identities (SVIDs) from the agent
with the usual SPIFFE client and call each other over mutual TLS all the time.

  -svids N             identities on the node; all but a few are idle (default 200)
  -max-delay DURATION  the most that the agent may wait, at random, before it reacts
                       to the taint of a key (default 10s; in the agent 60s)
  -o text|json         form of the report (default text). With json, standard output
                       is one JSON document and the timeline goes to standard error
  -v                   the logs of server and agent on standard error

Exit status: 0 every promise held; 1 one was broken, which is named, or the demo
could not run; 2 wrong command line; 130 interrupted. However it ends, short of SIGKILL,
it stops what it started and removes what it wrote.

The fields of the JSON report (null: it did not come to that):
  ok                              every promise held
  broken                          names of the broken promises
  promises                        name, promise, measured (what was measured), held
  svids, workloads                how many identities and workloads there were
  handshakes, failed_handshakes   mutual TLS calls between workloads, and how many of them failed
  first_failure                   what the first failed call or workload said
  longest_gap_seconds             longest time any workload had no valid SVID
  max_delay_seconds               the most random delay allowed
  delay_seconds                   the delay drawn
  taint_to_seen_seconds           until the agent saw that the old key is tainted
  taint_to_first_renewal_seconds  until the first renewal reached the server
  taint_to_in_use_seconds         until every workload had an SVID of the new key
  taint_to_settled_seconds        until nothing on the node depended on the old key
  taint_to_agreed_seconds         until the server knew that from the agent
  renewals                        renewals that reached the server after the taint
  most_renewals_per_second        most of them in any one second
  jwt                             same_during_taint, failed_requests, after_removal ("replaced",
                                  "kept", or empty without removal), removal_to_replaced_seconds
  safe_to_remove                  for the old key of each type: type, key, safe (at the removal),
                                  taint_to_safe_seconds, not_before (when it would be safe)
  stuck                           the step that did not end in time
  elapsed_seconds                 how long it all took
`

// settings are what the flags choose, and what tests make quicker or wrong.
type settings struct {
	svids    int
	maxDelay time.Duration
	json     bool
	verbose  bool

	workloads int
	refresh   time.Duration // between the agent's looks at the server
	pause     time.Duration // between steps, for whoever watches
	rate      int           // renewals a second after a taint; zero is the agent's own
}

// run is the command without the operating system. It returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && args[0] == workloadArg {
		if err := runWorkload(ctx, os.Stdin, stdout); err != nil {
			fmt.Fprintln(stderr, cli.PrintableLines(err.Error()))
			return exitBroken
		}
		return exitOK
	}
	s, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "demo: %s\nRun \"demo -h\" for help.\n", cli.PrintableLines(err.Error()))
		return exitUsage
	}
	return play(ctx, s, stdout, stderr)
}

func parse(args []string) (settings, error) {
	s := settings{workloads: 5, refresh: 5 * time.Second, pause: 2 * time.Second}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.IntVar(&s.svids, "svids", 200, "")
	flags.DurationVar(&s.maxDelay, "max-delay", 10*time.Second, "")
	form := flags.String("o", "text", "")
	flags.BoolVar(&s.verbose, "v", false, "")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	switch {
	case flags.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case s.svids < s.workloads || s.svids > maxSVIDs:
		return s, fmt.Errorf("-svids is %d: use %d (one for each workload) to %d", s.svids, s.workloads, maxSVIDs)
	case s.maxDelay < time.Millisecond || s.maxDelay > time.Hour:
		return s, fmt.Errorf("-max-delay is %v: use 1ms to 1h", s.maxDelay)
	case *form != "text" && *form != "json":
		return s, fmt.Errorf("-o is %q: use text or json", *form)
	}
	s.json = *form == "json"
	return s, nil
}

// maxSVIDs is where a run would take longer than anybody watches.
const maxSVIDs = 20_000

// play runs the demo, prints the report and returns the exit status.
func play(ctx context.Context, s settings, stdout, stderr io.Writer) int {
	timeline := stdout
	if s.json {
		timeline = stderr
	}
	ctx, gone := context.WithCancel(ctx)
	defer gone()
	screen := newScreen(timeline, gone)
	log := slog.New(slog.DiscardHandler)
	if s.verbose {
		log = slog.New(cli.NewTextHandler(stderr, slog.LevelDebug, "15:04:05.000", colored(stderr)))
		screen.live = false // the log would be written into the line that is redrawn
	}
	report, err := rotate(ctx, s, screen, log)
	screen.clear()
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "demo: interrupted; everything is stopped and removed")
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(stderr, "demo: %s\n", cli.PrintableLines(err.Error()))
		return exitBroken
	}
	if s.json {
		err = cli.PrintJSON(stdout, report)
	} else {
		err = report.print(stdout, screen)
	}
	if err != nil {
		fmt.Fprintf(stderr, "demo: write the report: %v\n", err)
		return exitBroken
	}
	if !report.OK {
		fmt.Fprintf(stderr, "demo: broken promise: %s\n", strings.Join(report.Broken, ", "))
		return exitBroken
	}
	return exitOK
}
