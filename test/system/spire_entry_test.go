package system_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// SPIRE's command for entries at our admin socket, beside its own server: what both print and
// how they exit is the same, except for the rows of the table in docs/spire.md.
func TestEntryCommandsOfSPIRE(t *testing.T) {
	t.Parallel()
	env := withSPIRE(t)
	env["UID"] = strconv.Itoa(os.Getuid())
	run(t, "spire-entry-commands.txtar", env)
}

// Each difference that docs/spire.md lists is shown by the script, and no other.
func TestEntryDifferencesAreListed(t *testing.T) {
	t.Parallel()
	script, err := os.ReadFile("testdata/spire-entry-commands.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var shown []string
	for _, m := range regexp.MustCompile(`(?m)^differs '([^']+)'`).FindAllStringSubmatch(string(script), -1) {
		if !slices.Contains(shown, m[1]) {
			shown = append(shown, m[1])
		}
	}
	text, err := os.ReadFile("../../docs/spire.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "| `spire-server entry` | SPIRE server | our server |\n|---|---|---|\n")
	if !found {
		t.Fatal("docs/spire.md has no table of differences")
	}
	var listed []string
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			break
		}
		listed = append(listed, strings.ReplaceAll(strings.TrimSpace(cells[1]), "`", ""))
	}
	slices.Sort(shown)
	slices.Sort(listed)
	if !slices.Equal(shown, listed) {
		t.Errorf("docs/spire.md lists %q, the script shows %q", listed, shown)
	}
}

// outcome is what a command printed and how it exited.
type outcome struct {
	Stdout, Stderr string
	Code           int
}

// entryCommand runs spire-server entry at a server's socket.
func entryCommand(ts *testscript.TestScript, socket string, args []string) outcome {
	path, err := findProgram(ts.Getenv("PATH"), "spire-server")
	ts.Check(err)
	cmd := exec.Command(path, slices.Concat([]string{"entry"}, args[:1], []string{"-socketPath", ts.Getenv("R") + "/" + socket}, args[1:])...)
	cmd.Dir = ts.MkAbs(".")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v", err)
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

func findProgram(path, name string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if info, err := os.Stat(file); err == nil && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("no %s in %s", name, path)
}

// volatile is what differs in each answer: IDs that a server has given, and when.
var volatile = regexp.MustCompile(`entry-[0-9a-f]{16}(-[0-9]+)?|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|"created_at":"[0-9]+"|Revision +: [0-9]+|"revision_number":"[0-9]+"`)

// bothEntryCommands runs a command at both servers, and fails if the outcomes differ. With ! it
// has to fail.
func bothEntryCommands(ts *testscript.TestScript, neg bool, args []string) {
	theirs, ours := entryCommand(ts, "spire.sock", args), entryCommand(ts, "admin.sock", args)
	if (theirs.Code != 0) != neg {
		ts.Fatalf("spire-server: %+v", theirs)
	}
	for _, o := range []*outcome{&theirs, &ours} {
		o.Stdout, o.Stderr = volatile.ReplaceAllString(o.Stdout, "VOLATILE"), volatile.ReplaceAllString(o.Stderr, "VOLATILE")
	}
	ts.Logf("%s", theirs.Stdout)
	if theirs != ours {
		ts.Fatalf("entry %q\nat spire-server: %+v\nat our server:   %+v", args, theirs, ours)
	}
}

// differingEntryCommands runs a command at both servers whose outcomes differ as a row of the
// table in docs/spire.md says: differs ROW STATUS-OF-SPIRE STATUS-OF-OURS ARGS.
func differingEntryCommands(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 4 {
		ts.Fatalf("usage: differs ROW STATUS STATUS ARGS")
	}
	theirs, ours := entryCommand(ts, "spire.sock", args[3:]), entryCommand(ts, "admin.sock", args[3:])
	if theirs == ours || fmt.Sprint(theirs.Code) != args[1] || fmt.Sprint(ours.Code) != args[2] {
		ts.Fatalf("entry %q\nat spire-server: %+v\nat our server:   %+v", args, theirs, ours)
	}
	ts.Logf("spire-server: %+v\nour server:   %+v", theirs, ours)
}
