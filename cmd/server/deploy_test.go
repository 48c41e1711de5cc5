package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/seal"
)

// The unit sets variables that exist, loads the credential that is looked for,
// and is not restarted after the exit codes that would only repeat.
func TestUnitFitsServer(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(filepath.Join("..", "..", "deploy", "renewd-server.service"))
	if err != nil {
		t.Fatal(err)
	}
	unit := string(data)
	names := regexp.MustCompile(`(?m)^Environment=(\w+)=`).FindAllStringSubmatch(unit, -1)
	if len(names) == 0 {
		t.Error("no Environment= found")
	}
	for _, m := range names {
		if !slices.ContainsFunc(fields, func(f config.Field[settings]) bool { return schema.Variable(&f) == m[1] }) {
			t.Errorf("%s is not a field's variable", m[1])
		}
	}
	for _, want := range []string{
		"\nRestartPreventExitStatus=" + strconv.Itoa(cli.ExitUsage) + " " + strconv.Itoa(exitStore) + "\n",
		"\nLoadCredentialEncrypted=" + seal.CredentialName + ":",
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if !strings.Contains(usage+keyUsage, seal.CredentialName) {
		t.Errorf("the help does not name %s", seal.CredentialName)
	}
}
