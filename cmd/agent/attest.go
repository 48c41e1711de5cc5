package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/agent/admin"
	"github.com/renewd/renewd/internal/cli"
)

// attestCommand is "attest".
func attestCommand(ctx context.Context, call *cli.Call) error {
	socket := call.Flags.String("admin-socket", defaultAdminSocket(call.Getenv), "")
	timeout := call.Flags.Duration("timeout", 30*time.Second, "")
	call.Output()
	args, err := call.Parse("PID")
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil || pid <= 0 {
		return cli.Usagef("attest: %q is not a PID", args[0])
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	result, err := admin.Ask(ctx, *socket, pid)
	if err != nil {
		return fmt.Errorf("attest process %d: %w", pid, err)
	}
	if call.JSON() {
		return cli.PrintJSON(call.Stdout, result)
	}
	return printAttestation(call.Stdout, result)
}

// defaultAdminSocket is the admin socket if no flag gives one.
func defaultAdminSocket(getenv func(string) string) string {
	workloadAPI := strings.TrimPrefix(defaultSocketPath(getenv), "unix://")
	return adminSocket(getenv("RENEWD_ADMIN_SOCKET_PATH"), strings.TrimPrefix(workloadAPI, "unix:"))
}

// outcomes says what the Workload API answers.
var outcomes = map[string]string{
	admin.Matched:     "matched, the Workload API gives it the identities of these entries",
	admin.Denied:      "denied (PermissionDenied), no entry matches",
	admin.Unavailable: "unavailable, an attestor failed and an entry could match",
	admin.Starting:    "starting, the agent does not know the entries yet",
}

func printAttestation(w io.Writer, result *admin.Attestation) error {
	head := cli.NewTable(w)
	row := func(name, value string) { _, _ = fmt.Fprintf(head, "%s\t%s\n", name, cell(value)) }
	row("Process:", fmt.Sprintf("%d %s", result.PID, result.Path))
	row("User, group:", fmt.Sprintf("%d, %d", result.UID, result.GID))
	row("Outcome:", cmp.Or(outcomes[result.Outcome], result.Outcome))
	if err := cli.Flush(head); err != nil {
		return err
	}
	table := cli.NewTable(w)
	_, _ = fmt.Fprint(table, "\nATTESTOR\tTIME\tSELECTOR\n")
	for _, f := range result.Attestors {
		lines := slices.Clone(f.Selectors)
		if f.Error != "" {
			lines = append(lines, "error: "+f.Error)
		}
		if len(lines) == 0 {
			lines = append(lines, "none")
		}
		name, took := f.Name, fmt.Sprintf("%.1f ms", f.Milliseconds)
		for _, line := range lines {
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", name, took, cell(line))
			name, took = "", ""
		}
	}
	if len(result.Entries) > 0 {
		_, _ = fmt.Fprint(table, "\nENTRY\tSPIFFE ID\tHINT\n")
		for _, e := range result.Entries {
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", cell(e.ID), cell(e.SPIFFEID), cell(e.Hint))
		}
	} else if len(result.NearMisses) > 0 {
		_, _ = fmt.Fprint(table, "\nALMOST\tSPIFFE ID\tLACKS ONLY\n")
		for _, e := range result.NearMisses {
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\n", cell(e.ID), cell(e.SPIFFEID), cell(e.Lacks))
		}
		if result.MoreNearMisses > 0 {
			_, _ = fmt.Fprintf(table, "and %d more\n", result.MoreNearMisses)
		}
	}
	return cli.Flush(table)
}

// cell is untrusted text for one cell of a table: labels and variables of a container may
// contain line feeds and tabs.
func cell(s string) string { return cli.Printable(s) }
