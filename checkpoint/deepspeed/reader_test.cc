// Facts about what the reader says of a SOURCE that cannot be one. Real checkpoints are read by the
// golden tests.
#include "checkpoint/deepspeed/reader.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "checkpoint/real_folder_case.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

namespace fs = std::filesystem;

class RequireSource : public testing::Test, protected RealFolder {
 protected:
  ErrorInfo refusal(const std::string& path, const std::string& tag = "") {
    try {
      require_source(storage_, path, tag);
    } catch (const Error& error) {
      return error.info();
    }
    return {};
  }
};

TEST_F(RequireSource, ANamedPipeIsNamedAndNotOpened) {
  const std::string path = root_ + "/pipe";
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  const ErrorInfo info = refusal(path);
  EXPECT_EQ(info.file, path);
  EXPECT_EQ(info.found, "a named pipe");
  EXPECT_EQ(info.expected, "a regular file");
  EXPECT_FALSE(info.next.empty());
}

TEST_F(RequireSource, NothingAtAllIsNotFound) {
  const ErrorInfo info = refusal(root_ + "/nothing");
  EXPECT_EQ(info.code, ErrorCode::kNotFound);
  EXPECT_EQ(info.found, "errno 2, ENOENT");
}

TEST_F(RequireSource, ALatestThatIsAFolderIsNamed) {
  fs::create_directories(root_ + "/latest");
  EXPECT_EQ(refusal(root_).file, root_ + "/latest");
  EXPECT_NE(refusal(root_).what.find("folder, not a file"), std::string::npos);
  EXPECT_EQ(refusal(root_, "global_step3").what, "");  // a tag makes it unimportant
}

TEST_F(RequireSource, ALatestUniversalThatIsAFolderIsNamed) {
  fs::create_directories(root_ + "/latest_universal");
  EXPECT_EQ(refusal(root_).file, root_ + "/latest_universal");
  std::ofstream(root_ + "/latest") << "global_step3";
  EXPECT_EQ(refusal(root_).what, "");  // latest is followed
}

TEST_F(RequireSource, FilesAndFoldersPass) {
  EXPECT_EQ(refusal(root_).what, "");
  std::ofstream(root_ + "/latest") << "global_step3";
  EXPECT_EQ(refusal(root_).what, "");
  EXPECT_EQ(refusal(root_ + "/latest").what, "");
}

}  // namespace
}  // namespace isoshard::checkpoint
