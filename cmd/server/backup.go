package main

import (
	"cmp"
	"context"
	"errors"
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
	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

// backupTimeout is how long a backup may take. It is longer than the server's own limit,
// so that the server's error is printed.
const backupTimeout = 130 * time.Second

// backup is a backup in progress.
type backup struct {
	*client
	file     string
	force    bool
	keyFile  string // of the server; empty: the keys are not decrypted
	progress *runbook.Screen
}

// shownBackup is a backup as -o json prints it.
type shownBackup struct {
	File        string              `json:"file"`
	Size        int64               `json:"size_bytes"`
	TakenAt     time.Time           `json:"taken_at"`
	TrustDomain string              `json:"trust_domain"`
	Deployments []shownBackupOfPart `json:"deployments"`
	// KeysChecked is set if all signing keys were decrypted.
	KeysChecked bool `json:"keys_checked"`
}

type shownBackupOfPart struct {
	Name    string `json:"name"`
	Keysets int    `json:"keysets"`
	Entries int    `json:"entries"`
	Agents  int    `json:"agents"`
}

// backupCommand is "backup".
func backupCommand(ctx context.Context, call *cli.Call) error {
	b := backup{client: newClient(call), progress: &runbook.Screen{W: call.Stderr}}
	b.timeout = backupTimeout
	b.Flags.BoolVar(&b.force, "force", false, "")
	b.Flags.StringVar(&b.keyFile, "key-file", "", "")
	file, err := b.Parse("file")
	if err != nil {
		return err
	}
	b.file = file[0]
	shown, err := b.make(ctx)
	if err != nil {
		return err
	}
	if b.JSON() {
		return cli.PrintJSON(b.Stdout, shown)
	}
	return b.print(shown)
}

// make writes the backup to a temporary file and renames it when it is durable and
// checked.
func (b *backup) make(ctx context.Context) (shown shownBackup, err error) {
	failed := func(err error) (shownBackup, error) {
		return shownBackup{}, fmt.Errorf("%s: %w", b.Name(), err)
	}
	var key seal.Manager
	if b.keyFile != "" {
		if key, err = seal.File(b.keyFile); err != nil {
			return failed(err)
		}
	}
	if err := b.checkNotExist(); err != nil {
		return failed(err)
	}
	f, err := os.CreateTemp(filepath.Dir(b.file), "."+filepath.Base(b.file)+".*") // mode 0600
	if err != nil {
		return failed(fmt.Errorf("%w: the folder must exist, and you must be able to write to it", err))
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var td spiffeid.TrustDomain
	err = b.do(ctx, func(ctx context.Context, o api.OperatorClient) error {
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
		return failed(fmt.Errorf("copy rejected and deleted: %w", err))
	}
	if sum.CopiedAt.IsZero() {
		return failed(errors.New("copy rejected and deleted: it is not marked as a copy, so that a server would not detect its restore"))
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

// checkNotExist checks that no file is overwritten.
func (b *backup) checkNotExist() error {
	if b.force {
		return nil
	}
	if _, err := os.Lstat(b.file); !errors.Is(err, fs.ErrNotExist) {
		return cmp.Or(err, fmt.Errorf("%s exists and is not replaced: choose another name, or overwrite it with --force", b.file))
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
			return fmt.Errorf("the copy is incomplete after %d bytes", got)
		case errors.Is(err, io.EOF):
			return nil
		case status.Code(err) == codes.DeadlineExceeded:
			return fmt.Errorf("the copy is incomplete after %v and %s: run the backup on the server's machine, over the admin socket, and copy the file from there",
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

// place renames a file to its final name, durably.
func (b *backup) place(temp string) error {
	// A link never replaces a file, unlike a rename, but not every file system has links.
	if b.force || os.Link(temp, b.file) != nil {
		if err := b.checkNotExist(); err != nil {
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
	_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", text(s.File), clock.Text(s.TakenAt), amount(s.Size),
		text(s.TrustDomain), text(strings.Join(names, " ")), sum.Keysets, sum.Entries, sum.Agents, keys)
	return cli.Flush(table)
}

// amount formats a number of bytes.
func amount(bytes int64) string {
	if bytes < 1<<20 {
		return fmt.Sprintf("%d KiB", (bytes+1<<10-1)>>10)
	}
	return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
}
