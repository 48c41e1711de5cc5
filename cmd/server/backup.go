package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

// backupTime is how long a copy may take: a little longer than the server gives
// it, so that it is the server who says so.
const backupTime = 130 * time.Second

// backup is one that is being made.
type backup struct {
	*client
	file     string
	force    bool
	keyFile  string // of the server; empty: what is sealed is not opened
	progress *runbook.Screen
}

// shownBackup is a backup as -o json prints it.
type shownBackup struct {
	File        string              `json:"file"`
	Size        int64               `json:"size_bytes"`
	TakenAt     time.Time           `json:"taken_at"`
	TrustDomain string              `json:"trust_domain"`
	Deployments []shownBackupOfPart `json:"deployments"`
	// KeysChecked: the signing keys were opened, all of them.
	KeysChecked bool `json:"keys_checked"`
}

type shownBackupOfPart struct {
	Name    string `json:"name"`
	Keysets int    `json:"keysets"`
	Entries int    `json:"entries"`
	Agents  int    `json:"agents"`
}

// backupCommand is "backup".
func backupCommand(ctx context.Context, args []string, e cli.Env) error {
	fset := flag.NewFlagSet("backup", flag.ContinueOnError)
	b := backup{client: newClient(fset, e), progress: &runbook.Screen{W: e.Stderr}}
	b.timeout = backupTime
	fset.BoolVar(&b.force, "force", false, "")
	fset.StringVar(&b.keyFile, "key-file", "", "")
	file, err := parse(fset, args, backupUsage, e, "file")
	if err != nil {
		return err
	}
	b.file = file[0]
	shown, err := b.make(ctx, fset.Name())
	if err != nil {
		return err
	}
	if b.json() {
		return cli.PrintJSON(b.Stdout, shown)
	}
	return b.print(shown)
}

// make makes the backup beside its place and brings it there when it is durable
// and checked.
func (b *backup) make(ctx context.Context, operation string) (shown shownBackup, err error) {
	failed := func(err error) (shownBackup, error) {
		return shownBackup{}, fmt.Errorf("%s: %w", operation, err)
	}
	var key seal.Manager
	if b.keyFile != "" {
		if key, err = seal.File(b.keyFile); err != nil {
			return failed(err)
		}
	}
	if err := b.free(); err != nil {
		return failed(err)
	}
	f, err := os.CreateTemp(filepath.Dir(b.file), "."+filepath.Base(b.file)+".*") // mode 0600
	if err != nil {
		return failed(fmt.Errorf("%w: the folder must exist, and you be able to write in it", err))
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var td spiffeid.TrustDomain
	err = b.do(ctx, operation, func(ctx context.Context, o api.OperatorClient) error {
		resp, err := o.ListDeployments(ctx, &api.ListDeploymentsRequest{TrustDomain: b.trustDomain})
		if err == nil {
			td, err = spiffeid.TrustDomainFromString(resp.GetTrustDomain())
		}
		if err != nil {
			return err
		}
		return b.receive(ctx, o, f)
	})
	if err != nil {
		return shownBackup{}, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return failed(err)
	}
	sum, err := store.Inspect(ctx, f.Name(), store.Options{TrustDomain: td, Seal: key})
	if err != nil {
		return failed(fmt.Errorf("the copy is not good, and nothing is kept of it: %w", err))
	}
	if sum.CopiedAt.IsZero() {
		return failed(errors.New("the copy does not say that it is one, and nothing is kept of it: a server that was restored from it would take it for complete"))
	}
	if err := b.place(f.Name()); err != nil {
		return failed(err)
	}
	b.progress.Clear()
	shown = shownBackup{File: b.file, Size: sum.Size, TakenAt: sum.CopiedAt, TrustDomain: td.Name(), KeysChecked: key != nil}
	for _, d := range sum.Deployments {
		shown.Deployments = append(shown.Deployments, shownBackupOfPart(d))
	}
	return shown, nil
}

// free checks that nothing is overwritten.
func (b *backup) free() error {
	if b.force {
		return nil
	}
	if _, err := os.Lstat(b.file); !errors.Is(err, fs.ErrNotExist) {
		return cmp.Or(err, fmt.Errorf("%s exists and is left as it is: choose another name, or overwrite it with -force", b.file))
	}
	return nil
}

// receive writes the server's copy to w.
func (b *backup) receive(ctx context.Context, o api.OperatorClient, w io.Writer) error {
	begin, got := time.Now(), int64(0)
	stream, err := o.Backup(ctx, &api.BackupRequest{})
	if err != nil {
		return err
	}
	for size := int64(0); ; {
		part, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && (size == 0 || size != got):
			return fmt.Errorf("%d bytes arrived and it is not complete", got)
		case errors.Is(err, io.EOF):
			return nil
		case status.Code(err) == codes.DeadlineExceeded:
			return fmt.Errorf("not complete after %v, %s have arrived: make it on the server's machine, at the admin socket, and copy it from there",
				time.Since(begin).Round(time.Second), amount(got))
		case err != nil:
			return err
		}
		if _, err := w.Write(part.GetData()); err != nil {
			return err
		}
		got, size = got+int64(len(part.GetData())), part.GetSize()
		if now := time.Now(); now.Sub(begin) > time.Second {
			b.progress.Progress("received", amount(got)+" received", now)
		}
	}
}

// place gives a file its name, for good.
func (b *backup) place(temp string) error {
	// A link fails where a rename would replace. Not every file system has it.
	if b.force || os.Link(temp, b.file) != nil {
		if err := b.free(); err != nil {
			return err
		}
		if err := os.Rename(temp, b.file); err != nil {
			return err
		}
	}
	d, err := os.Open(filepath.Dir(b.file))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (b *backup) print(s shownBackup) error {
	table := cli.NewTable(b.Stdout)
	_, _ = fmt.Fprintf(table, "FILE\tTAKEN AT\tSIZE\tTRUST DOMAIN\tDEPLOYMENTS\tKEYSETS\tENTRIES\tAGENTS\tKEYS\n")
	var names []string
	var sum shownBackupOfPart
	for _, d := range s.Deployments {
		names = append(names, d.Name)
		sum.Keysets, sum.Entries, sum.Agents = sum.Keysets+d.Keysets, sum.Entries+d.Entries, sum.Agents+d.Agents
	}
	keys := "not checked"
	if s.KeysChecked {
		keys = "checked"
	}
	_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", text(s.File), s.TakenAt.Format("2006-01-02 15:04:05 UTC"), amount(s.Size),
		text(s.TrustDomain), text(strings.Join(names, " ")), sum.Keysets, sum.Entries, sum.Agents, keys)
	return flushed(table)
}

// amount is a number of bytes as a person would say it.
func amount(bytes int64) string {
	if bytes < 1<<20 {
		return fmt.Sprintf("%d KiB", (bytes+1<<10-1)>>10)
	}
	return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
}
