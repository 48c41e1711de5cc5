package admin

import (
	"path"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server/keyset"
)

// Backup implements the service.
func (s *Service) Backup(_ *api.BackupRequest, stream grpc.ServerStreamingServer[api.BackupResponse]) error {
	if s.config.Backup == nil {
		return status.Error(codes.Unimplemented, "this server keeps nothing that could be copied: it has no data_dir")
	}
	size, err := s.config.Backup(stream.Context(), parts{stream})
	if err != nil {
		return fail(err)
	}
	return stream.Send(&api.BackupResponse{Size: size})
}

// parts sends what is written to it.
type parts struct {
	stream grpc.ServerStreamingServer[api.BackupResponse]
}

func (p parts) Write(b []byte) (int, error) {
	if err := p.stream.Send(&api.BackupResponse{Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// carryOutBackup writes the line in the log of a backup, which is all that is
// streamed; admit bounds it.
func (s *Service) carryOutBackup(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	begin := s.now()
	counted := &countedStream{ServerStream: stream}
	err := handler(srv, counted)
	log := s.log.With("actor", keyset.Actor(stream.Context()), "operation", path.Base(info.FullMethod),
		"bytes", counted.bytes, "outcome", status.Code(err).String(), "took", s.now().Sub(begin))
	if err != nil {
		log.Warn("operator's backup failed", "error", status.Convert(err).Message())
		return err
	}
	log.Info("operator's backup done")
	return nil
}

// countedStream counts what of a copy the connection has taken.
type countedStream struct {
	grpc.ServerStream
	bytes int64
}

func (c *countedStream) SendMsg(m any) error {
	err := c.ServerStream.SendMsg(m)
	if part, ok := m.(*api.BackupResponse); ok && err == nil {
		c.bytes += int64(len(part.GetData()))
	}
	return err
}
