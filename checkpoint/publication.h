// Publication: a folder or a small file appears whole or not at all. Work goes on under a hidden
// name beside the final one; only when every byte is durable does one rename make it visible.
//
//   parent/.name.isoshard-<nonce>/   being written         -- rename -->   parent/name/
//   parent/.trash-<nonce>/           the one it replaced, being removed
//
// Where folders cannot be renamed (mounts of object stores), everything is written under the final
// name, beside a mark `.isoshard-<nonce>`: a folder that holds one is unfinished. The manifest
// comes when all else is durable, and the mark goes last.
//
// The folder's lock is held while it is written, so that others can tell it from a leftover.
//
// The hidden names never contain a name that DeepSpeed searches for (deepspeed/checkpoint/
// reshape_utils.py, get_files walks through every folder), so an unfinished folder is never loaded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "checkpoint/folder_lock.h"
#include "checkpoint/leftover_folder.h"
#include "core/storage.h"

namespace isoshard::checkpoint {

class StagedFolder {
 public:
  // Makes the hidden folder, and the final path's parents where they are missing. Throws
  // Error(kExists) when the final path is taken and not `overwrite`, or by a file; with `overwrite`
  // throws before any work when the file system cannot exchange two folders.
  // A `leftover` becomes the hidden folder, with what is in it, unless somebody else has taken it
  // or folders cannot be renamed: resumed() says whether. `storage` must outlive the object.
  StagedFolder(Storage& storage, std::string final_path, bool overwrite,
               std::unique_ptr<LeftoverFolder> leftover = nullptr);

  // Removes what was made, unless it was published or is kept. Parents made here go too while they
  // are empty.
  ~StagedFolder();

  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;

  const std::string& path() const { return staging_path_; }  // where to write
  bool in_place() const { return in_place_; }                // path() is the final path already
  bool resumed() const { return resumed_; }                  // path() holds what a leftover held
  const std::string& final_path() const { return final_path_; }

  // From now on the hidden folder stays, to be taken up again; its manifest goes, as one that has
  // it may be a folder that was replaced, which nobody takes up. Not in place, nor once publish()
  // may have shown it.
  void keep();

  // In place: makes durable what was written so far, before the manifest. Otherwise publish() does
  // it, once.
  void settle();

  // Makes everything durable, then visible. Every file must be closed. The write errors that a file
  // system reports only to fsync of that very file are the writer's business: sync files first.
  // An Error's `safe` says on which side of the rename it happened.
  void publish();

  // After publish: the replaced folder, where it could not be removed; empty otherwise.
  const std::string& left_behind() const { return left_behind_; }

 private:
  void refuse_other(const std::string& name) const;
  void make_parents();
  void probe_exchange();
  void probe_rename();
  void take_up(std::unique_ptr<LeftoverFolder> leftover);
  void begin_in_place();
  void end_in_place();
  bool is_still_ours() const;
  bool clear_in_place();
  void sync_folders();
  void show(bool replaces);
  void replace_old();
  void remove_staging() noexcept;

  Storage& storage_;
  std::string final_path_;
  std::string parent_path_;
  std::string staging_path_;
  bool overwrite_;
  bool published_ = false;
  bool in_place_ = false;
  bool resumed_ = false;
  bool kept_ = false;
  bool may_be_shown_ = false;              // staging_path_ may be the replaced folder
  std::unique_ptr<FolderLock> lock_;       // of staging_path_
  std::string mark_;                       // in place: the name of the mark
  std::vector<std::string> made_parents_;  // outermost first
  std::string left_behind_;
};

// Whether a folder holds the mark of a publication in place that has not come to its end.
bool is_unfinished(Storage& storage, const std::string& folder);

// Deletes a folder whose name other programs know, if it holds just so many entries: it is moved
// aside first, and back where it holds others, so that nothing is lost that came in meanwhile.
// False: it is there still.
bool remove_if_it_holds(Storage& storage, const std::string& folder, size_t entries);

// Names in `parent` that an interrupted publication has left, or one that is still at work: nothing
// here can tell the two apart. Empty when there is no such folder.
std::vector<std::string> leftovers(Storage& storage, const std::string& parent);

}  // namespace isoshard::checkpoint
