package system_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

var (
	// fenced is a block of commands. tested lists those that other tests run as they stand.
	fenced = regexp.MustCompile("(?sm)^ *```(\\w*)\n(.*?)\n *```$")
	tested = map[string]string{
		"README.md":        "TestReadme",
		"docs/runbook.md":  "runbook.txtar",
		"deploy/README.md": "deploy.TestBoot",
		"docs/spire.md":    "spire-documents.txtar",
		"CONTRIBUTING.md":  "make's targets: .ci/run",
	}

	// inline is a command of ours or of SPIRE's in a sentence or a table.
	inline = regexp.MustCompile("`((?:renewd-|spire-)?(?:agent|server)|keysetctl) ([^`]+)`")

	// notCommands are inline texts that only look like commands.
	notCommands = map[string]string{
		"server not answering, renewals paused":                               "a log message",
		"server verified with the changed trust_bundle_file":                  "a log message",
		"server verified with the trust bundle of its source":                 "a log message",
		"server not verified by the bundle in force":                          "a log message",
		"agent SVID revoked by another attestation of the same node identity": "a log message",
		"keysetctl --spire-socket /run/spire-server/private/api.sock":         "the beginning of every command under SPIRE",
	}

	placeholder = regexp.MustCompile(`\b[A-Z]+\b`)
)

// commandsOf returns the inline commands of a document, with the names that the programs
// have before installation, and whether it has blocks of commands.
func commandsOf(text string) (commands []string, blocks bool) {
	for _, m := range fenced.FindAllStringSubmatch(text, -1) {
		blocks = blocks || m[1] == "sh" || m[1] == "console"
	}
	for _, m := range inline.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		command := strings.TrimPrefix(m[1], "renewd-") + " " + strings.Join(strings.Fields(m[2]), " ")
		if notCommands[command] == "" {
			commands = append(commands, command)
		}
	}
	return commands, blocks
}

// TestDocumentedCommands: each command in the documents is run by a script, as it stands but
// for its placeholders. One that is named without flags and arguments has to exist.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	run := make(map[string]bool)
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range scripts {
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^(?:! )?documented \S+ '(.*)'$`).FindAllSubmatch(text, -1) {
			run[string(m[1])] = true
		}
	}
	found := 0
	err = fs.WalkDir(os.DirFS("../.."), ".", func(file string, _ fs.DirEntry, err error) error {
		if err != nil || path.Ext(file) != ".md" || path.Dir(file) == "findings" {
			return err
		}
		text, err := os.ReadFile(filepath.Join("../..", file))
		if err != nil {
			return err
		}
		commands, blocks := commandsOf(string(text))
		if blocks && tested[file] == "" {
			t.Errorf("%s has a block of commands that no test runs", file)
		}
		for _, command := range commands {
			found++
			words := strings.Fields(command)
			switch {
			case run[command]:
			case strings.Contains(command, " -") || placeholder.MatchString(command):
				t.Errorf("%s: no script runs %q", file, command)
			case strings.HasPrefix(command, "spire-"):
				// Named only, and SPIRE's programs may be absent.
			default:
				help, err := exec.CommandContext(t.Context(), filepath.Join(programs(), words[0]), append(words[1:], "--help")...).CombinedOutput()
				if err != nil || !strings.Contains(string(help), command) {
					t.Errorf("%s: there is no %q: %v\n%s", file, command, err, help)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if found < 50 {
		t.Errorf("found only %d commands in the documents", found)
	}
}

// pasted FILE runs a document's first block of commands in a fresh shell, which has only
// the variables that are named there for the server.
func pasted(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: pasted FILE")
	}
	text, err := os.ReadFile(filepath.Join("../..", args[0]))
	ts.Check(err)
	for _, m := range fenced.FindAllStringSubmatch(string(text), -1) {
		if m[1] != "sh" {
			continue
		}
		ts.Check(ts.Exec("env", "-i", "PATH="+ts.Getenv("PATH"), "RENEWD_ADMIN_SOCKET="+ts.Getenv("RENEWD_ADMIN_SOCKET"), "sh", "-c", m[2]))
		return
	}
	ts.Fatalf("%s has no block of commands", args[0])
}

// documented FILE COMMAND runs a command that stands in a document. Its placeholders are
// words in capitals: variables of the script.
func documented(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: documented FILE COMMAND")
	}
	text, err := os.ReadFile(filepath.Join("../..", args[0]))
	ts.Check(err)
	commands, _ := commandsOf(string(text))
	for _, m := range fenced.FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(m[2]) {
			commands = append(commands, strings.TrimSpace(line))
		}
	}
	stands := false
	for _, command := range commands {
		stands = stands || command == args[1]
	}
	if !stands {
		ts.Fatalf("%s does not have %q", args[0], args[1])
	}
	command := placeholder.ReplaceAllStringFunc(args[1], func(name string) string {
		value := ts.Getenv(name)
		if value == "" {
			ts.Fatalf("%s: the script has no value for %s", args[1], name)
		}
		return value
	})
	// In a shell, because some have a redirection.
	if err := ts.Exec("sh", "-c", command); (err != nil) != neg {
		ts.Fatalf("%s: %v", command, err)
	}
}

// The commands of the documents, in the order of a deployment's life.
func TestDocuments(t *testing.T) {
	t.Parallel()
	run(t, "documents.txtar", nil)
}

// docs/spire.md, with a real SPIRE server and a node that moves from spire-agent.
func TestDocumentsUnderSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-documents.txtar", withSPIRE(t))
}
